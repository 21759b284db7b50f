#include "cache/pooled_rows.cuh"
#include "cache/tail.cuh"
#include "core/launch.h"
#include "device/reduce.cuh"

namespace dsv4 {

// An entry of 128 rows reads 512 KiB: its columns are split over many blocks, so that the flush of a single request
// uses many multiprocessors. A block reads one cache line (128 bytes) of each row.
constexpr int kWarps = 8;
constexpr int kColumns = 32;                                    // per block
constexpr int kLanesAcross = kColumns / kFour;                  // lanes that share a row
constexpr int kRowGroups = kWarps * kWarpLanes / kLanesAcross;  // rows read at the same time
constexpr int kRowsAtOnce = 4;                                  // per thread: the models' 128 rows in one step

__global__ void __launch_bounds__(kWarps* kWarpLanes)
    hca_compress_tail_kernel(const float* __restrict__ ka, const float* __restrict__ za,
                             const int32_t* __restrict__ tail_len, const int32_t* __restrict__ request_slots,
                             __nv_bfloat16* __restrict__ entry, bool* __restrict__ valid_mask, int64_t slots, int rows,
                             int width, int m) {
  await_previous_grid();
  const int64_t request = blockIdx.x;
  const int64_t slot = slot_of(request_slots, request, slots);
  const bool full = tail_is_full(tail_len, slot, m);
  if (blockIdx.y == 0 && threadIdx.x == 0) valid_mask[request] = full;
  if (!full) return;

  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int column = blockIdx.y * kColumns + lane % kLanesAcross * kFour;
  const int64_t first = slot * rows * width + column;
  PooledRows pooled;
  for (int row = threadIdx.x / kLanesAcross; row < m && column < width; row += kRowGroups * kRowsAtOnce) {
    Four<float> scores[kRowsAtOnce];
    Four<float> values[kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t at = first + static_cast<int64_t>(row + i * kRowGroups) * width;
      scores[i] = masked_scores();
      if (row + i * kRowGroups >= m) continue;
      scores[i] = *reinterpret_cast<const Four<float>*>(za + at);
      values[i] = *reinterpret_cast<const Four<float>*>(ka + at);
    }
    pooled.add(scores, values);
  }
#pragma unroll
  for (int distance = kLanesAcross; distance < kWarpLanes; distance *= 2) pooled.merge(pooled.of_lane(lane ^ distance));

  // Lane c of the first warp finishes column c.
  __shared__ float top[kWarps][kColumns], sum[kWarps][kColumns], value[kWarps][kColumns];
  if (lane < kLanesAcross) {
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      top[warp][lane * kFour + j] = pooled.top[j];
      sum[warp][lane * kFour + j] = pooled.sum[j];
      value[warp][lane * kFour + j] = pooled.value[j];
    }
  }
  __syncthreads();
  if (warp != 0 || blockIdx.y * kColumns + lane >= width) return;
  float highest = top[0][lane];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) highest = fmaxf(highest, top[i][lane]);
  const float base = PooledRows::finite_base(highest);
  float all_sum = 0.0f, all_value = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const float keep = expf(top[i][lane] - base);
    all_sum += keep * sum[i][lane];
    all_value += keep * value[i][lane];
  }
  entry[request * width + blockIdx.y * kColumns + lane] =
      __float2bfloat16_rn(all_sum == 0.0f ? 0.0f : all_value / all_sum);
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_hca_compress_tail(const dsv4_hca_compress_tail_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hca_compress_tail");
  const dsv4_hca_compress_tail_args args = check.read(given);
  const int64_t slots = extent(args.tail_ka, 0);
  const int64_t rows = extent(args.tail_ka, 1);
  const int64_t width = extent(args.tail_ka, 2);
  const int64_t requests = extent(args.request_slots, 0);
  check_first_tail(check, "tail_ka", args.tail_ka);
  check_tail(check, "tail_za", args.tail_za, args.tail_ka);
  check.tensor("tail_len", args.tail_len, one_of(DSV4_INT32), {slots});
  check.tensor("request_slots", args.request_slots, one_of(DSV4_INT32), {kAny});
  check.range("m", args.m, 1, rows);
  check.tensor("out_entry", args.out_entry, one_of(DSV4_BFLOAT16), {requests, width});
  check.tensor("out_valid_mask", args.out_valid_mask, one_of(DSV4_BOOL), {requests});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (requests == 0) return DSV4_OK;
  const dim3 grid(static_cast<uint32_t>(requests), std::max(1u, blocks_for(width, kColumns)));
  return launch<hca_compress_tail_kernel>(
      target, {grid, kWarps * kWarpLanes}, static_cast<const float*>(args.tail_ka.data),
      static_cast<const float*>(args.tail_za.data), static_cast<const int32_t*>(args.tail_len.data),
      static_cast<const int32_t*>(args.request_slots.data), static_cast<__nv_bfloat16*>(args.out_entry.data),
      static_cast<bool*>(args.out_valid_mask.data), slots, static_cast<int>(rows), static_cast<int>(width), args.m);
}
