// Sums over the lanes of a warp, in a fixed order: the same input gives the same bits.
#pragma once

namespace dsv4 {

constexpr int kWarpLanes = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The sum of `value` over `group` neighbouring lanes, a power of two; every lane of the warp must call it.
__device__ inline float sum_over_group(float value, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// Sums each of 8 values over the warp: lane l gets the sum of values[l / 4]. In each of the first three steps a lane
// exchanges half of its values with another lane, so it costs 9 shuffles instead of the 40 of eight separate sums.
__device__ inline float sum_each_over_warp(float (&values)[8]) {
  const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const int distance = 4 * half;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float give = upper ? values[i] : values[i + half];
      const float keep = upper ? values[i + half] : values[i];
      values[i] = keep + __shfl_xor_sync(kFullWarp, give, distance);
    }
  }
  return sum_over_group(values[0], 4);
}

}  // namespace dsv4
