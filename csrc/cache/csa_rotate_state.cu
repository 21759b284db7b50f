#include "cache/tail.cuh"
#include "core/launch.h"
#include "device/row.cuh"

namespace dsv4 {

constexpr int kThreads = 128;

// Four columns of values and of scores per thread; a request's blocks along y. `from` becomes the previous block.
__global__ void __launch_bounds__(kThreads)
    csa_rotate_state_kernel(const bool* __restrict__ valid_mask, const int32_t* __restrict__ request_slots, float* ka,
                            float* za, float* kb, float* zb, float* from_k, float* from_z, int32_t* tail_len,
                            int64_t slots, int64_t slot_columns, bool clear_rows) {
  await_previous_grid();
  const int64_t request = blockIdx.x;
  const bool valid = valid_mask[request];
  const int64_t slot = slot_of(request_slots, request, slots);
  if (!valid || slot < 0) return;
  if (blockIdx.y == 0 && threadIdx.x == 0) tail_len[slot] = 0;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kFour;
  if (column >= slot_columns) return;
  const int64_t at = slot * slot_columns + column;
  const auto four = [at](float* rows) -> Four<float>& { return *reinterpret_cast<Four<float>*>(rows + at); };
  const Four<float> k = four(from_k);
  const Four<float> z = four(from_z);
  four(kb) = k;
  four(zb) = z;
  if (!clear_rows) return;
  four(ka) = four(za) = four(from_k) = four(from_z) = Four<float>{};
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_csa_rotate_state(const dsv4_csa_rotate_state_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("csa_rotate_state");
  const dsv4_csa_rotate_state_args args = check.read(given);
  const int64_t requests = extent(args.valid_mask, 0);
  const int64_t slots = extent(args.tail_ka, 0);
  const int64_t slot_columns = saturating_product(extent(args.tail_ka, 1), extent(args.tail_ka, 2));
  const bool two_projections = present(args.next_kb) || present(args.next_zb);
  check.tensor("valid_mask", args.valid_mask, one_of(DSV4_BOOL), {kAny});
  check.tensor("request_slots", args.request_slots, one_of(DSV4_INT32), {requests});
  check_first_tail(check, "tail_ka", args.tail_ka);
  check_tail(check, "tail_za", args.tail_za, args.tail_ka);
  check_tail(check, "tail_kb", args.tail_kb, args.tail_ka);
  check_tail(check, "tail_zb", args.tail_zb, args.tail_ka);
  check.tensor("tail_len", args.tail_len, one_of(DSV4_INT32), {slots});
  check_next_rows(check, args);
  check.flag("clear_rows", args.clear_rows);
  check_blocks_of_slot(check, slot_columns, kThreads * kFour);
  check.changes(args.tail_ka, args.tail_za, args.tail_kb, args.tail_zb, args.tail_len, args.next_kb, args.next_zb);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (requests == 0) return DSV4_OK;
  const dim3 grid(static_cast<uint32_t>(requests), std::max(1u, blocks_for(slot_columns, kThreads * kFour)));
  const dsv4_tensor& from_k = two_projections ? args.next_kb : args.tail_ka;
  const dsv4_tensor& from_z = two_projections ? args.next_zb : args.tail_za;
  return launch<csa_rotate_state_kernel>(
      target, {grid, kThreads}, static_cast<const bool*>(args.valid_mask.data),
      static_cast<const int32_t*>(args.request_slots.data), static_cast<float*>(args.tail_ka.data),
      static_cast<float*>(args.tail_za.data), static_cast<float*>(args.tail_kb.data),
      static_cast<float*>(args.tail_zb.data), static_cast<float*>(from_k.data), static_cast<float*>(from_z.data),
      static_cast<int32_t*>(args.tail_len.data), slots, slot_columns, args.clear_rows != 0);
}
