// The largest magnitude of a row, by one block.
#pragma once

#include "device/reduce.cuh"
#include "moe/quantize_target.cuh"

namespace dsv4 {

// Magnitudes compare as their bits do.
__device__ inline uint32_t warp_amax_bits(float amax) { return __reduce_max_sync(kFullWarp, __float_as_uint(amax)); }

// The largest over the block, for every thread; a barrier for all of them.
__device__ inline float block_amax(float amax) {
  __shared__ uint32_t of_warps[kQuantizeThreads / kWarpLanes];
  const uint32_t bits = warp_amax_bits(amax);
  __syncthreads();  // what an earlier call left has been read
  if (threadIdx.x % kWarpLanes == 0) of_warps[threadIdx.x / kWarpLanes] = bits;
  __syncthreads();
  uint32_t most = 0;
  for (uint32_t warp = 0; warp < blockDim.x / kWarpLanes; ++warp) most = max(most, of_warps[warp]);
  return __uint_as_float(most);
}

// Over a row's values.
template <int Unit, bool kSwiglu, typename T>
__device__ inline float row_amax(const Source& source, uint32_t row, uint32_t columns) {
  float amax = 0.0f;
  for (uint32_t column = threadIdx.x * kChunk; column < columns; column += blockDim.x * kChunk) {
    float values[kChunk];
    load_chunk<Unit, kSwiglu, T>(source, row, column, values);
    amax = fmaxf(amax, largest_magnitude(values));
  }
  return block_amax(amax);
}

// Threads of a block that goes through rows of so many items: as few rounds as kQuantizeThreads would take, with the
// fewest idle threads.
inline uint32_t threads_for_row(uint32_t items) {
  const uint32_t rounds = blocks_for(items, kQuantizeThreads);
  return blocks_for(blocks_for(items, rounds), kWarpLanes) * kWarpLanes;
}

// Blocks for so many rows, one at a time: fills the device.
inline uint32_t row_blocks(const LaunchTarget& launch_target, uint32_t rows, uint32_t threads) {
  const uint32_t fill = static_cast<uint32_t>(launch_target.device->multiprocessors) *
                        kQuantizeBlocksPerMultiprocessor * (kQuantizeThreads / threads);
  return std::min(rows, fill);
}

}  // namespace dsv4
