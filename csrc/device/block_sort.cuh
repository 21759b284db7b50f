// Sorts distinct numbers in shared memory with one block.
#pragma once

#include "device/scan.cuh"

namespace dsv4 {

constexpr int kBins = 2048;
constexpr int kBinBits = 11;

constexpr int kSortPadding = 4;  // elements past the end that sort_entries() may write

template <int Threads>
struct SortScratch {
  uint32_t bins[kBins];
  uint32_t warp_sums[Threads / kWarpLanes];
  uint32_t warp_lowest[Threads / kWarpLanes];
  uint32_t warp_highest[Threads / kWarpLanes];
};

// Bits below the leading kBinBits of the numbers 0 to `range`.
__device__ inline int shift_for(uint64_t range) { return max(64 - __clzll(range) - kBinBits, 0); }

template <int Threads>
__device__ inline void clear_bins(uint32_t* bins) {
  for (int i = threadIdx.x; i < kBins / 4; i += Threads) reinterpret_cast<uint4*>(bins)[i] = {0, 0, 0, 0};
}

// This thread's share of the bins in a prefix sum. bins: 16-byte aligned, in the shared memory of any block of the
// cluster.
template <int Threads>
__device__ inline void add_own_bins(const uint32_t* bins, uint32_t (&counts)[kBins / Threads]) {
  static_assert(kBins / Threads % 4 == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < kBins / Threads; i += 4) {
    const uint4 four = reinterpret_cast<const uint4*>(bins)[(threadIdx.x * (kBins / Threads) + i) / 4];
    counts[i] += four.x;
    counts[i + 1] += four.y;
    counts[i + 2] += four.z;
    counts[i + 3] += four.w;
  }
}

// Bitonic sort, for distributions that binning handles badly; several times slower. Every comparison puts the smaller
// number first, so the padding of a full network would stay at the end and need not exist. Steps within 64 adjacent
// numbers stay in one warp.
template <int Threads>
__device__ void bitonic_sort(uint64_t* entries, int count) {
  constexpr int kWarpNumbers = 2 * kWarpLanes;
  for (int size = 2; size < 2 * count; size *= 2)
    for (int distance = size / 2; distance > 0; distance /= 2) {
      const bool mirrored = distance == size / 2;  // the first step of a merge: of two sorted halves
      for (int pair = threadIdx.x; pair < (count + size) / 2; pair += Threads) {
        const int within = pair & (distance - 1);
        const int low = 2 * pair - within;
        const int high = mirrored ? low + size - 1 - 2 * within : low + distance;
        if (high >= count) continue;
        const uint64_t a = entries[low], b = entries[high];
        if (a > b) {
          entries[low] = b;
          entries[high] = a;
        }
      }
      const int next_span = distance > 1 ? distance : 2 * size;
      if (max(2 * distance, next_span) <= kWarpNumbers)
        __syncwarp();
      else
        __syncthreads();
    }
  __syncthreads();
}

// Sorts `count` distinct numbers in ascending order. They are distributed over bins by their distance from the minimum:
// usually few share a bin, and those are ranked by counting; otherwise the sorting network is used. `entries` has room
// for kSortPadding more. The caller synchronises before; the function does at its end. low_bits: at least the numbers'
// bits minus 32.
template <int Threads, int Most>
__device__ void sort_entries(SortScratch<Threads>& scratch, uint64_t* entries, int count, int low_bits) {
  constexpr int kEach = Most / Threads;
  constexpr int kBinsEach = kBins / Threads;
  constexpr int kWarps = Threads / kWarpLanes;
  constexpr unsigned kCrowded = 64;
  constexpr unsigned kAtOnce = kSortPadding;
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  uint64_t own[kEach];
  uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = i * Threads + threadIdx.x;
    if (place >= count) break;
    own[i] = entries[place];
    lowest = min(lowest, static_cast<uint32_t>(own[i] >> low_bits));
    highest = max(highest, static_cast<uint32_t>(own[i] >> low_bits));
  }
  lowest = __reduce_min_sync(kFullWarp, lowest);
  highest = __reduce_max_sync(kFullWarp, highest);
  if (lane == 0) {
    scratch.warp_lowest[warp] = lowest;
    scratch.warp_highest[warp] = highest;
  }
  clear_bins<Threads>(scratch.bins);
  __syncthreads();
  lowest = __reduce_min_sync(kFullWarp, scratch.warp_lowest[lane % kWarps]);
  highest = __reduce_max_sync(kFullWarp, scratch.warp_highest[lane % kWarps]);
  const uint64_t base = uint64_t{lowest} << low_bits;
  const int shift = shift_for(((uint64_t{highest} + 1) << low_bits) - 1 - base);
  const auto bin_of = [&](uint64_t entry) { return static_cast<uint32_t>((entry - base) >> shift); };

  uint32_t place_in_bin[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i * Threads + threadIdx.x >= count) break;
    place_in_bin[i] = atomicAdd(&scratch.bins[bin_of(own[i])], 1u);
  }
  __syncthreads();
  uint32_t counts[kBinsEach] = {};
  add_own_bins<Threads>(scratch.bins, counts);
  uint32_t sum = 0, largest = 0;
#pragma unroll
  for (const uint32_t bin_count : counts) {
    sum += bin_count;
    largest = max(largest, bin_count);
  }
  if (__syncthreads_or(largest > kCrowded)) {
    bitonic_sort<Threads>(entries, count);
    return;
  }

  uint32_t total;
  uint32_t start = sum_before<Threads>(sum, scratch.warp_sums, &total);
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    scratch.bins[threadIdx.x * kBinsEach + i] = start;
    start += counts[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i * Threads + threadIdx.x >= count) break;
    entries[scratch.bins[bin_of(own[i])] + place_in_bin[i]] = own[i];
  }
  if (threadIdx.x < kAtOnce) entries[count + threadIdx.x] = ~uint64_t{0};
  __syncthreads();
  uint32_t ranks[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = i * Threads + threadIdx.x;
    if (place >= count) break;
    own[i] = entries[place];  // adjacent threads have adjacent numbers, which compare with the same few
    const uint32_t bin = bin_of(own[i]);
    const uint32_t first = scratch.bins[bin], end = bin + 1 < kBins ? scratch.bins[bin + 1] : count;
    ranks[i] = first;
    // Numbers past the end of the bin are larger and not counted.
#pragma unroll 1
    for (uint32_t other = first; other < end; other += kAtOnce) {
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; ++j) ranks[i] += entries[other + j] < own[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i * Threads + threadIdx.x >= count) break;
    entries[ranks[i]] = own[i];
  }
  __syncthreads();
}

}  // namespace dsv4
