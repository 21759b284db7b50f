#include <dsv4/moe.h>

#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "moe/tiles.h"

namespace dsv4 {

constexpr int kThreads = 256;
constexpr int64_t kMaxRows = int64_t{1} << 30;

struct CountedRows {
  int32_t* tile_to_expert;
  int32_t* row_to_slot;
  int32_t rows;      // of all experts
  int32_t max_rows;  // of an expert
  int32_t tile_size;
};

// A thread per row; the thread of a tile's first row stores its expert.
template <typename Count>
__global__ void __launch_bounds__(kThreads)
    moe_tiles_from_counts_kernel(const Count* __restrict__ counts, CountedRows counted) {
  await_previous_grid();
  const int32_t row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= counted.rows) return;
  const int32_t expert = row / counted.max_rows;
  const bool used = row - expert * counted.max_rows < counts[expert];
  counted.row_to_slot[row] = used ? row : -1;
  if (row % counted.tile_size == 0) counted.tile_to_expert[row / counted.tile_size] = used ? expert : -1;
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_tiles_from_counts(const dsv4_moe_tiles_from_counts_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_tiles_from_counts");
  const dsv4_moe_tiles_from_counts_args args = check.read(given);
  const int64_t experts = extent(args.counts, 0);
  check.tensor("counts", args.counts, one_of(DSV4_INT32, DSV4_INT64), {kAny});
  check.require(is_tile_size(args.tile_size), "tile_size", "16, 32, 64 or 128", args.tile_size);
  check.range("max_rows", args.max_rows, 0, kMaxRows);
  check.multiple("max_rows", args.max_rows, args.tile_size);
  const int64_t rows = saturating_product(experts, args.max_rows);
  check.range("counts elements times max_rows", rows, 0, kMaxRows);
  if (dsv4_status status = check.status()) return status;  // before the division by tile_size
  check.tensor("out_tile_to_expert", args.out_tile_to_expert, one_of(DSV4_INT32), {rows / args.tile_size});
  check.tensor("out_row_to_slot", args.out_row_to_slot, one_of(DSV4_INT32), {rows});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (rows == 0) return DSV4_OK;
  CountedRows counted = {};
  counted.tile_to_expert = static_cast<int32_t*>(args.out_tile_to_expert.data);
  counted.row_to_slot = static_cast<int32_t*>(args.out_row_to_slot.data);
  counted.rows = static_cast<int32_t>(rows);
  counted.max_rows = args.max_rows;
  counted.tile_size = args.tile_size;
  const Geometry geometry = {blocks_for(rows, kThreads), kThreads};
  return with_index_type(args.counts.dtype, [&](auto count) {
    using Count = decltype(count);
    return launch<moe_tiles_from_counts_kernel<Count>>(target, geometry, static_cast<const Count*>(args.counts.data),
                                                       counted);
  });
}
