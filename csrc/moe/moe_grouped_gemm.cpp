#include <dsv4/moe.h>

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
