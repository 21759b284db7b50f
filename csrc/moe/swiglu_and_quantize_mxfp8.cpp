#include "kernels.h"
#include "moe/padded_rows.h"

namespace dsv4 {

constexpr PaddedTile kSwigluMxfp8Tile = {8, 256, 24};  // of aot/moe/swiglu_and_quantize_mxfp8.py

}  // namespace dsv4

extern "C" dsv4_status dsv4_swiglu_and_quantize_mxfp8(const dsv4_swiglu_and_quantize_mxfp8_args* given,
                                                      dsv4_stream stream) {
  using namespace dsv4;
  Check check("swiglu_and_quantize_mxfp8");
  const dsv4_swiglu_and_quantize_mxfp8_args args = check.read(given);
  const int64_t rows = extent(args.x, 0);
  const int64_t columns = extent(args.x, 1) / 2;
  check.tensor("x", args.x, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.multiple("x columns (gate, up)", extent(args.x, 1), 2 * kMxGroup);
  check_extents(check, rows, columns);
  check_padding(check, rows, args.permutation_map, args.n_used);
  const float limit = check_limit(check, args.limit);
  check_mxfp8(check, rows, columns, args.out_data, args.out_scale);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (rows == 0 || columns == 0) return DSV4_OK;
  const auto kernel = is_aligned(args.x) ? aot::swiglu_and_quantize_mxfp8_aligned : aot::swiglu_and_quantize_mxfp8_any;
  return kernel(target, padded_grid(target, swizzled_rows(rows), columns, kSwigluMxfp8Tile), args.x.data,
                args.permutation_map.data, args.n_used.data, args.out_data.data, args.out_scale.data, limit,
                args.x.stride[0], static_cast<int32_t>(columns), static_cast<int32_t>(rows));
}
