#include <dsv4/moe.h>

#include <algorithm>

#include "core/check.h"
#include "kernels.h"

namespace dsv4 {
namespace {

constexpr int64_t kColumnBlock = 1024;        // of aot/moe/padded_squared_relu.py
constexpr int kBlocksPerMultiprocessor = 16;  // of 128 threads: fills a multiprocessor
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kVector = 16;  // what the aligned kernel's arguments are multiples of

// The aligned kernel reads and writes 16 bytes a thread.
bool is_aligned(const dsv4_tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % kVector == 0 && tensor.stride[0] % kVector == 0 &&
         tensor.shape[1] % kVector == 0;
}

}  // namespace
}  // namespace dsv4

extern "C" dsv4_status dsv4_padded_squared_relu(const dsv4_padded_squared_relu_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("padded_squared_relu");
  const dsv4_padded_squared_relu_args args = check.read(given);
  const int64_t rows = extent(args.x, 0);
  const int64_t columns = extent(args.x, 1);
  check.tensor("x", args.x, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.range("x rows", rows, 0, INT32_MAX);
  check.range("x columns", columns, 0, kMaxGridY * kColumnBlock);
  check.tensor("permutation_map", args.permutation_map, one_of(DSV4_INT32), {rows});
  if (args.n_used.rank == 0)
    check.tensor("n_used", args.n_used, one_of(DSV4_INT32), {});
  else
    check.tensor("n_used", args.n_used, one_of(DSV4_INT32), {1});
  check.tensor("out", args.out, one_of(DSV4_BFLOAT16), {rows, columns}, Layout::kStridedRows);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (rows == 0 || columns == 0) return DSV4_OK;
  const uint32_t column_blocks = blocks_for(columns, kColumnBlock);
  const int64_t fill = int64_t{target.device->multiprocessors} * kBlocksPerMultiprocessor / column_blocks;
  const dim3 grid(static_cast<uint32_t>(std::clamp<int64_t>(rows, 1, std::max<int64_t>(fill, 1))), column_blocks);
  const auto kernel =
      is_aligned(args.x) && is_aligned(args.out) ? aot::padded_squared_relu_aligned : aot::padded_squared_relu_any;
  return kernel(target, grid, args.x.data, args.permutation_map.data, args.n_used.data, args.out.data, args.x.stride[0],
                args.out.stride[0], static_cast<int32_t>(columns), static_cast<int32_t>(rows));
}
