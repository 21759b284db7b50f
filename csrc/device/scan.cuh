// Prefix sums over the lanes of a warp and the threads of a block.
#pragma once

#include "device/reduce.cuh"

namespace dsv4 {

// Inclusive prefix sum over the warp's lanes. Every lane must call it.
__device__ inline uint32_t sum_up_to_lane(uint32_t value) {
  const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// Exclusive prefix sum over the block; *total: the sum over all threads. Every thread of the block must call it.
// warp_sums: shared memory, one per warp.
template <int Threads>
__device__ uint32_t sum_before(uint32_t value, uint32_t (&warp_sums)[Threads / kWarpLanes], uint32_t* total) {
  static_assert(Threads / kWarpLanes <= kWarpLanes, "one warp adds the sums of all");
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const uint32_t up_to = sum_up_to_lane(value);
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == kWarpLanes - 1) warp_sums[warp] = up_to;
  __syncthreads();
  const uint32_t warp_sum = lane < Threads / kWarpLanes ? warp_sums[lane] : 0;
  *total = __reduce_add_sync(kFullWarp, warp_sum);
  return __reduce_add_sync(kFullWarp, lane < warp ? warp_sum : 0) + up_to - value;
}

}  // namespace dsv4
