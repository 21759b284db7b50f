#include "cache/tail.cuh"
#include "core/launch.h"
#include "device/row.cuh"

namespace dsv4 {

constexpr int kThreads = 256;
constexpr int kFoursPerThread = 4;  // of values, and as many of scores

// A request's blocks along y; a single one without columns if rows are not cleared.
__global__ void __launch_bounds__(kThreads)
    hca_reset_state_kernel(const bool* __restrict__ valid_mask, const int32_t* __restrict__ request_slots, float* ka,
                           float* za, int32_t* tail_len, int64_t slots, int64_t slot_columns, bool clear_rows) {
  await_previous_grid();
  const int64_t request = blockIdx.x;
  const bool valid = valid_mask[request];
  const int64_t slot = slot_of(request_slots, request, slots);
  if (!valid || slot < 0) return;
  if (blockIdx.y == 0 && threadIdx.x == 0) tail_len[slot] = 0;
  if (!clear_rows) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads * kFoursPerThread + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kFoursPerThread; ++i) {
    const int64_t column = (first + i * kThreads) * kFour;
    if (column >= slot_columns) return;
    *reinterpret_cast<Four<float>*>(ka + slot * slot_columns + column) = Four<float>{};
    *reinterpret_cast<Four<float>*>(za + slot * slot_columns + column) = Four<float>{};
  }
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_hca_reset_state(const dsv4_hca_reset_state_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hca_reset_state");
  const dsv4_hca_reset_state_args args = check.read(given);
  const int64_t requests = extent(args.valid_mask, 0);
  const int64_t slots = extent(args.tail_ka, 0);
  const int64_t slot_columns = saturating_product(extent(args.tail_ka, 1), extent(args.tail_ka, 2));
  constexpr int64_t columns_per_block = kThreads * kFoursPerThread * kFour;
  check.tensor("valid_mask", args.valid_mask, one_of(DSV4_BOOL), {kAny});
  check.tensor("request_slots", args.request_slots, one_of(DSV4_INT32), {requests});
  check_first_tail(check, "tail_ka", args.tail_ka);
  check_tail(check, "tail_za", args.tail_za, args.tail_ka);
  check.tensor("tail_len", args.tail_len, one_of(DSV4_INT32), {slots});
  check.flag("clear_rows", args.clear_rows);
  check_blocks_of_slot(check, slot_columns, columns_per_block);
  check.changes(args.tail_ka, args.tail_za, args.tail_len);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (requests == 0) return DSV4_OK;
  const uint32_t blocks = args.clear_rows ? std::max(1u, blocks_for(slot_columns, columns_per_block)) : 1u;
  return launch<hca_reset_state_kernel>(
      target, {dim3(static_cast<uint32_t>(requests), blocks), kThreads}, static_cast<const bool*>(args.valid_mask.data),
      static_cast<const int32_t*>(args.request_slots.data), static_cast<float*>(args.tail_ka.data),
      static_cast<float*>(args.tail_za.data), static_cast<int32_t*>(args.tail_len.data), slots, slot_columns,
      args.clear_rows != 0);
}
