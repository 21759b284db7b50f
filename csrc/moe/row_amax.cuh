// The largest magnitude of a row, by one block.
#pragma once

#include "device/reduce.cuh"
#include "moe/quantize_target.cuh"

namespace dsv4 {

// Magnitudes compare as their bits do, and NaN is the largest.
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

// The largest magnitude of a chunk; NaN if one of the values is. Pairs of 16-bit values are compared as they are.
template <typename T, int Unit, bool kSwiglu>
__device__ inline float amax_of(const Source& source, const RawChunk<T, Unit, kSwiglu>& raw) {
  if constexpr (!kSwiglu && sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const auto& pairs = reinterpret_cast<const Pair(&)[kChunk / 2]>(raw);
    Pair most = __habs2(pairs[0]);
#pragma unroll
    for (int i = 1; i < kChunk / 2; ++i) most = __hmax2_nan(most, __habs2(pairs[i]));
    return max_or_nan(static_cast<float>(most.x), static_cast<float>(most.y));
  } else {
    float values[kChunk];
    values_of(source, raw, values);
    return largest_magnitude(values);
  }
}

constexpr int kKeptChunks = 2;  // of a row that a thread keeps in registers until its amax is known

// What a chunk that holds a NaN does to the amax of its row.
enum class NanChunk {
  kCounts,      // the row's amax is NaN
  kPassedOver,  // the row's amax is that of the other chunks
};

// Finds the amax of a row, calls on_amax(amax), then encode(column, values, their amax) for each of this thread's
// chunks. By all threads of a block.
template <NanChunk kNan, typename T, int Unit, bool kSwiglu, typename OnAmax, typename Encode>
__device__ inline void by_row_amax(const Source& source, uint32_t row, uint32_t columns, OnAmax&& on_amax,
                                   Encode&& encode) {
  RawChunk<T, Unit, kSwiglu> kept[kKeptChunks];
  float of_kept[kKeptChunks];
  const uint32_t step = blockDim.x * kChunk, first = threadIdx.x * kChunk, rest = first + kKeptChunks * step;
#pragma unroll
  for (int i = 0; i < kKeptChunks; ++i)
    if (first + i * step < columns) kept[i] = load_raw<T, Unit, kSwiglu>(source, row, first + i * step);
  float amax = 0.0f;
  const auto include = [&](float of_chunk) {
    amax = kNan == NanChunk::kCounts ? max_or_nan(amax, of_chunk) : fmaxf(amax, of_chunk);
  };
#pragma unroll
  for (int i = 0; i < kKeptChunks; ++i)
    if (first + i * step < columns) {
      of_kept[i] = amax_of(source, kept[i]);
      include(of_kept[i]);
    }
  for (uint32_t column = rest; column < columns; column += step)
    include(amax_of(source, load_raw<T, Unit, kSwiglu>(source, row, column)));
  on_amax(block_amax(amax));
  float values[kChunk];
#pragma unroll
  for (int i = 0; i < kKeptChunks; ++i)
    if (first + i * step < columns) {
      values_of(source, kept[i], values);
      encode(first + i * step, values, of_kept[i]);
    }
  for (uint32_t column = rest; column < columns; column += step) {
    load_chunk<Unit, kSwiglu, T>(source, row, column, values);  // from the cache
    encode(column, values, largest_magnitude(values));
  }
}

// Threads of a block that goes through rows of so many items: as few rounds as kQuantizeThreads would take, with the
// fewest idle threads.
inline uint32_t threads_for_row(uint32_t items) {
  const uint32_t rounds = blocks_for(items, kQuantizeThreads);
  return blocks_for(blocks_for(items, rounds), kWarpLanes) * kWarpLanes;
}

}  // namespace dsv4
