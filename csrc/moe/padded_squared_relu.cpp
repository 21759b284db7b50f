#include "kernels.h"
#include "moe/padded_rows.h"

namespace dsv4 {

constexpr PaddedTile kSquaredReluTile = {16, 256, 24};  // of aot/moe/padded_squared_relu.py

}  // namespace dsv4

extern "C" dsv4_status dsv4_padded_squared_relu(const dsv4_padded_squared_relu_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("padded_squared_relu");
  const dsv4_padded_squared_relu_args args = check.read(given);
  const int64_t rows = extent(args.x, 0);
  const int64_t columns = extent(args.x, 1);
  check.tensor("x", args.x, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check_extents(check, rows, columns);
  check_padding(check, rows, args.permutation_map, args.n_used);
  check.tensor("out", args.out, one_of(DSV4_BFLOAT16), {rows, columns}, Layout::kStridedRows);
  check.in_place(args.out, args.x);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (rows == 0 || columns == 0) return DSV4_OK;
  const auto kernel =
      is_aligned(args.x) && is_aligned(args.out) ? aot::padded_squared_relu_aligned : aot::padded_squared_relu_any;
  return kernel(target, padded_grid(target, rows, columns, kSquaredReluTile), args.x.data, args.permutation_map.data,
                args.n_used.data, args.out.data, args.x.stride[0], args.out.stride[0], static_cast<int32_t>(columns),
                static_cast<int32_t>(rows));
}
