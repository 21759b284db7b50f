#include <dsv4/moe.h>

#include <algorithm>

#include "kernels.h"
#include "moe/few_tiles.h"
#include "moe/grouped_product.h"

namespace dsv4 {
namespace {

using Choice = ProductChoice<decltype(&aot::moe_gemm_bf16_mxfp4_plain_16)>;

// By operands, whether SwiGLU follows, and rows of a tile: 16, 64, 128.
constexpr Choice kChoices[kOperandsCount][2][3] = {
    {{{aot::moe_gemm_bf16_mxfp4_plain_16, 128},
      {aot::moe_gemm_bf16_mxfp4_plain_64, 64},
      {aot::moe_gemm_bf16_mxfp4_plain_128, 128}},
     {{aot::moe_gemm_bf16_mxfp4_swiglu_16, 64},
      {aot::moe_gemm_bf16_mxfp4_swiglu_64, 64},
      {aot::moe_gemm_bf16_mxfp4_swiglu_128, 64}}},
    {{{aot::moe_gemm_bf16_nvfp4_plain_16, 64},
      {aot::moe_gemm_bf16_nvfp4_plain_64, 64},
      {aot::moe_gemm_bf16_nvfp4_plain_128, 128}},
     {{aot::moe_gemm_bf16_nvfp4_swiglu_16, 64},
      {aot::moe_gemm_bf16_nvfp4_swiglu_64, 64},
      {aot::moe_gemm_bf16_nvfp4_swiglu_128, 64}}},
    {{{aot::moe_gemm_e2m1_nvfp4_plain_16, 128, 64},
      {aot::moe_gemm_e2m1_nvfp4_plain_64, 128},
      {aot::moe_gemm_e2m1_nvfp4_plain_128, 64}},
     {{aot::moe_gemm_e2m1_nvfp4_swiglu_16, 128, 64},
      {aot::moe_gemm_e2m1_nvfp4_swiglu_64, 128, 64},
      {aot::moe_gemm_e2m1_nvfp4_swiglu_128, 64}}},
    {{{aot::moe_gemm_e4m3_mxfp4_plain_16, 128}, {nullptr, 0}, {aot::moe_gemm_e4m3_mxfp4_plain_128, 64, 128}},
     {{aot::moe_gemm_e4m3_mxfp4_swiglu_16, 128, 64}, {nullptr, 0}, {aot::moe_gemm_e4m3_mxfp4_swiglu_128, 64}}},
};

using InterleavedLaunch = decltype(&aot::moe_gemm_interleaved_mxfp4_plain_16);

struct InterleavedChoice {
  InterleavedLaunch launch;
  int32_t weight_rows;  // of a block
};

// By weights (MXFP4, NVFP4), whether SwiGLU follows, and rows of a tile.
constexpr InterleavedChoice kInterleavedChoices[2][2][3] = {
    {{{aot::moe_gemm_interleaved_mxfp4_plain_16, 64},
      {aot::moe_gemm_interleaved_mxfp4_plain_64, 128},
      {aot::moe_gemm_interleaved_mxfp4_plain_128, 256}},
     {{aot::moe_gemm_interleaved_mxfp4_swiglu_16, 64},
      {aot::moe_gemm_interleaved_mxfp4_swiglu_64, 128},
      {aot::moe_gemm_interleaved_mxfp4_swiglu_128, 256}}},
    {{{aot::moe_gemm_interleaved_nvfp4_plain_16, 64},
      {aot::moe_gemm_interleaved_nvfp4_plain_64, 128},
      {aot::moe_gemm_interleaved_nvfp4_plain_128, 256}},
     {{aot::moe_gemm_interleaved_nvfp4_swiglu_16, 64},
      {aot::moe_gemm_interleaved_nvfp4_swiglu_64, 128},
      {aot::moe_gemm_interleaved_nvfp4_swiglu_128, 256}}},
};

// Whether the kernel for few tiles takes this product: by shapes alone, so that a captured launch fits any routes.
bool has_few_tiles(const GroupedProduct& product) {
  return product.interleaved && product.size == 0 && product.tiles <= std::min(kFewTiles, product.experts) &&
         (product.weight_rows >= kManyWeightRows || product.tiles * product.weight_rows <= kFewWeightRows) &&
         product.inner <= kFewTilesInner && product.weight_rows <= kFewTilesWeightRows;
}

FewTiles few_tiles(const dsv4_moe_grouped_gemm_args& args, const GroupedProduct& product) {
  FewTiles few = {};
  few.x = static_cast<const __nv_bfloat16*>(args.x.data);
  few.weight = static_cast<const uint4*>(args.weight.data);
  few.factors = static_cast<const uint32_t*>(args.weight_scale.data);
  few.tile_to_expert = static_cast<const int32_t*>(args.tile_to_expert.data);
  few.row_to_slot = static_cast<const int32_t*>(args.row_to_slot.data);
  few.alpha = static_cast<const float*>(args.alpha.data);
  few.slot_weights = static_cast<const float*>(args.slot_weights.data);
  few.out = static_cast<__nv_bfloat16*>(args.out.data);
  few.x_stride = args.x.stride[0];
  few.out_stride = args.out.stride[0];
  few.weight_rows = static_cast<int32_t>(product.weight_rows);
  few.inner = static_cast<int32_t>(product.inner);
  few.experts = static_cast<int32_t>(product.experts);
  few.x_rows = static_cast<int32_t>(product.x_rows);
  few.top_k = args.top_k;
  few.alphas = product.alphas;
  few.tiles = static_cast<int32_t>(product.tiles);
  few.limit = product.limit;
  return few;
}

constexpr DtypeSet kXDtypes = kPackedFp4 | one_of(DSV4_BFLOAT16, DSV4_FLOAT8_E4M3FN);

}  // namespace
}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_grouped_gemm(const dsv4_moe_grouped_gemm_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_grouped_gemm");
  const dsv4_moe_grouped_gemm_args args = check.read(given);
  check.flag("swiglu", args.swiglu);
  const GroupedProduct product = check_grouped_product(check, args, kXDtypes, args.swiglu != 0);
  check.tensor("out", args.out, one_of(DSV4_BFLOAT16), {product.rows, product.columns}, Layout::kStridedRows);
  check.aligned_rows("out", args.out, kProductAlignment);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (product.tiles == 0 || product.x_rows == 0) return DSV4_OK;
  if (has_few_tiles(product))
    return launch_few_tiles(target, few_tiles(args, product), product.nvfp4_weights, args.swiglu != 0);
  const Choice& choice = kChoices[product.operands][args.swiglu][product.size];
  const InterleavedChoice& by_words = kInterleavedChoices[product.nvfp4_weights][args.swiglu][product.size];
  const uint32_t column_blocks = product.interleaved ? blocks_for(product.weight_rows, by_words.weight_rows)
                                                     : blocks_for(product.columns, choice.columns_on(target));
  const int64_t blocks = product.tiles * column_blocks;
  if (dsv4_status status = check_product_blocks("moe_grouped_gemm", blocks)) return status;
  if (product.interleaved)
    return by_words.launch(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.weight.data,
                           args.weight_scale.data, args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data,
                           args.slot_weights.data, args.out.data, args.x.stride[0], args.out.stride[0],
                           static_cast<int32_t>(product.weight_rows), static_cast<int32_t>(product.inner),
                           static_cast<int32_t>(product.experts), static_cast<int32_t>(product.x_rows), args.top_k,
                           product.alphas, present(args.slot_weights), static_cast<int32_t>(column_blocks),
                           product.limit);
  return choice.launch(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.x_scale.data, args.weight.data,
                       args.weight_scale.data, args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data,
                       args.slot_weights.data, args.out.data, args.x.stride[0], args.out.stride[0],
                       static_cast<int32_t>(product.columns), static_cast<int32_t>(product.inner),
                       static_cast<int32_t>(product.experts), static_cast<int32_t>(product.x_rows), args.top_k,
                       product.alphas, present(args.slot_weights), static_cast<int32_t>(column_blocks), product.limit);
}
