#include <dsv4/moe.h>

#include "kernels.h"
#include "moe/grouped_product.h"
#include "moe/moe_grouped_gemm_policy.h"

namespace dsv4 {
namespace {

constexpr auto kKernels = product_kernels(aot::kMoeGroupedGemmKernels);

// Of interleaved weights (MXFP4, NVFP4), by whether SwiGLU follows, and rows of a tile.
struct InterleavedKernels {
  const aot::MoeGroupedGemmInterleavedKernel* of[2][2][kTileSizes];
};

constexpr InterleavedKernels interleaved_kernels() {
  InterleavedKernels found = {};
  for (const auto* kernel : aot::kMoeGroupedGemmInterleavedKernels) {
    const auto& is = kernel->constants[0];
    found.of[is.groups == 4][is.swiglu][tile_size_index(is.rows)] = kernel;
  }
  return found;
}

constexpr InterleavedKernels kInterleavedKernels = interleaved_kernels();

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
  // NOLINTNEXTLINE(clang-analyzer-security.ArrayBound): sizes without an index were refused above
  const auto& by_words = *kInterleavedKernels.of[product.nvfp4_weights][args.swiglu][product.size];
  const auto& kernel = *kKernels.of[product.operands][args.swiglu][product.size];
  const int32_t block_rows = by_words.on(*target.device).columns;
  const GroupedGemmPolicy policy = moe_grouped_gemm_policy(
      *target.device,
      {product.interleaved, product.tile_rows, product.tiles, product.experts, product.weight_rows, product.inner},
      block_rows);
  if (policy.few_tiles)
    return launch_few_tiles(target, few_tiles(args, product), product.nvfp4_weights, args.swiglu != 0);
  const uint32_t column_blocks = product.interleaved ? blocks_for(product.weight_rows, block_rows)
                                                     : blocks_for(product.columns, kernel.on(*target.device).columns);
  const int64_t blocks = product.tiles * column_blocks;
  if (dsv4_status status = check_product_blocks("moe_grouped_gemm", blocks)) return status;
  if (product.interleaved)
    return by_words(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.weight.data, args.weight_scale.data,
                    args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data, args.slot_weights.data,
                    args.out.data, args.x.stride[0], args.out.stride[0], static_cast<int32_t>(product.weight_rows),
                    static_cast<int32_t>(product.inner), static_cast<int32_t>(product.experts),
                    static_cast<int32_t>(product.x_rows), args.top_k, product.alphas, present(args.slot_weights),
                    static_cast<int32_t>(column_blocks), product.limit);
  return kernel(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.x_scale.data, args.weight.data,
                args.weight_scale.data, args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data,
                args.slot_weights.data, args.out.data, args.x.stride[0], args.out.stride[0],
                static_cast<int32_t>(product.columns), static_cast<int32_t>(product.inner),
                static_cast<int32_t>(product.experts), static_cast<int32_t>(product.x_rows), args.top_k, product.alphas,
                present(args.slot_weights), static_cast<int32_t>(column_blocks), product.limit);
}

extern "C" int64_t dsv4_moe_tile_max_slots_per_expert(int32_t tile_size) {
  return dsv4::max_slots_per_expert(tile_size);
}
