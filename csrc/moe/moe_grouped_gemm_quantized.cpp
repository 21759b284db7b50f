#include <dsv4/moe.h>

#include "device/swizzle.cuh"
#include "moe/grouped_product.h"

namespace dsv4 {
namespace {

constexpr auto kKernels = product_kernels(aot::kMoeGroupedGemmQuantizedKernels);

constexpr DtypeSet kXDtypes = kPackedFp4 | one_of(DSV4_FLOAT8_E4M3FN);

}  // namespace
}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_grouped_gemm_quantized(const dsv4_moe_grouped_gemm_quantized_args* given,
                                                       dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_grouped_gemm_quantized");
  const dsv4_moe_grouped_gemm_quantized_args args = check.read(given);
  check.flag("swizzle", args.swizzle);
  const GroupedProduct product = check_grouped_product(check, args, kXDtypes, true);
  const bool nvfp4 = product.operands == kNvfp4;
  if (!nvfp4)
    check.absent("global_scale", args.global_scale, "when x is MXFP8");
  else if (args.global_scale.rank == 0)
    check.tensor("global_scale", args.global_scale, one_of(DSV4_FLOAT32), {});
  else
    check.tensor("global_scale", args.global_scale, one_of(DSV4_FLOAT32), {1});
  check.multiple("weight rows", product.weight_rows, 2 * kInnerStep);  // the second product's inner size, twice
  const int64_t scales = product.columns / (nvfp4 ? 16 : 32);
  const DtypeSet scale_dtypes = nvfp4 ? one_of(DSV4_UINT8, DSV4_FLOAT8_E4M3FN) : kE8m0Bytes;
  if (nvfp4)
    check.tensor("out", args.out, kPackedFp4, {product.rows, product.columns / 2});
  else
    check.tensor("out", args.out, one_of(DSV4_UINT8, DSV4_FLOAT8_E4M3FN), {product.rows, product.columns});
  if (args.swizzle)
    check.tensor("out_scale", args.out_scale, scale_dtypes, {swizzled_rows(product.rows), swizzled_columns(scales)});
  else
    check.tensor("out_scale", args.out_scale, scale_dtypes, {product.rows, scales});
  check.aligned_rows("out", args.out, kProductAlignment);
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(args.out_scale.data) % kProductAlignment;
  check.require(misaligned == 0, "out_scale", "an address that is a multiple of 16", misaligned);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (product.tiles == 0 || (product.x_rows == 0 && !args.swizzle)) return DSV4_OK;
  const auto& kernel = *kKernels.of[product.operands][true][product.size];
  // With a swizzle, blocks also write the zeros of the padding's columns.
  const int64_t columns = args.swizzle ? swizzled_columns(scales) * (nvfp4 ? 16 : 32) : product.columns;
  const uint32_t column_blocks = blocks_for(columns, kernel.on(*target.device).columns);
  const int64_t blocks = product.tiles * column_blocks;
  if (dsv4_status status = check_product_blocks("moe_grouped_gemm_quantized", blocks)) return status;
  // Without rows of x there is nothing to multiply: no expert's tiles.
  const int64_t experts = product.x_rows ? product.experts : 0;
  return kernel(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.x_scale.data, args.weight.data,
                args.weight_scale.data, args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data,
                args.slot_weights.data, args.global_scale.data, args.out.data, args.out_scale.data, args.x.stride[0],
                static_cast<int32_t>(product.columns), static_cast<int32_t>(product.inner),
                static_cast<int32_t>(experts), static_cast<int32_t>(product.x_rows), args.top_k, product.alphas,
                present(args.slot_weights), static_cast<int32_t>(column_blocks), product.limit, args.swizzle);
}
