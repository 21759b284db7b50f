// What the kernels of both ops share: reading the count, finding the last block, dividing pages among warps, the grid.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/device.h"
#include "device/reduce.cuh"
#include "stash/checks.h"

namespace dsv4 {

constexpr int kVectorBytes = 16;

// In the workspace, all zero between launches.
struct StashCounters {
  uint32_t arrivals;  // of blocks that have read the metadata
  uint32_t drawn;     // spans that blocks have drawn, see bulk_ring.cuh
};
static_assert(sizeof(StashCounters) <= kCounterBytes);

// The number of rows to move: what the device says, but never more than there are.
__device__ inline int64_t tokens_of(const int64_t* num_tokens, int64_t rows) {
  const int64_t tokens = *num_tokens;
  return tokens < 0 ? 0 : tokens < rows ? tokens : rows;
}

// One of the blocks is told that it is the last to get here; what the others have read before, it may overwrite. Every
// thread of the block calls it; the answer is that of the block's last thread, false to the rest.
__device__ inline bool arrives_last(uint32_t* arrivals) {
  __syncthreads();
  if (threadIdx.x != blockDim.x - 1) return false;
  uint32_t before;  // goes back to 0 after the last block
  asm volatile("atom.inc.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(arrivals), "r"(gridDim.x - 1)
               : "memory");
  if (before != gridDim.x - 1) return false;
  __threadfence();  // the acquiring half, which only the last block needs
  return true;
}

constexpr int kUnitThreads = 256;
constexpr int kUnitWarps = kUnitThreads / kWarpLanes;
// A unit is what a warp moves at a time: 16 bytes per access where everything is aligned to that, else an element.
// In flight per lane: 64 bytes, or 16 words where they are shorter than 4 bytes.
constexpr int unit_words(int64_t word_bytes) { return word_bytes >= 4 ? static_cast<int>(64 / word_bytes) : 16; }
constexpr int64_t unit_bytes(int64_t word_bytes) { return unit_words(word_bytes) * kWarpLanes * word_bytes; }
template <typename Word>
constexpr int kUnitWords = unit_words(sizeof(Word));
template <typename Word>
constexpr int64_t kUnitBytes = unit_bytes(sizeof(Word));

// The units of a warp: warps take units in turn, so that neighbouring warps move neighbouring bytes. Adds up instead of
// dividing.
template <typename Word>
struct UnitWalk {
  uint32_t page, unit;  // unit within the page
  uint32_t page_step, unit_step, units_per_page;

  __device__ explicit UnitWalk(int64_t page_bytes) {
    units_per_page = static_cast<uint32_t>((page_bytes + kUnitBytes<Word> - 1) / kUnitBytes<Word>);
    const uint32_t warp = blockIdx.x * kUnitWarps + threadIdx.x / kWarpLanes, warps = gridDim.x * kUnitWarps;
    page = warp / units_per_page;
    unit = warp % units_per_page;
    page_step = warps / units_per_page;
    unit_step = warps % units_per_page;
  }

  __device__ void advance() {
    page += page_step;
    unit += unit_step;
    if (unit >= units_per_page) {
      unit -= units_per_page;
      ++page;
    }
  }

  // From the first byte of the page.
  __device__ int64_t offset() const { return unit * kUnitBytes<Word>; }

  // How many of the first `total` bytes of all pages are in this unit.
  __device__ int64_t size(int64_t page_bytes, int64_t total) const {
    const int64_t in_page = total - page * page_bytes;
    const int64_t left = (in_page < page_bytes ? in_page : page_bytes) - offset();
    return left < 0 ? 0 : left < kUnitBytes<Word> ? left : kUnitBytes<Word>;
  }
};

// A lane's part of a unit, on its way through registers. Addresses are multiples of the word; so is the size, unless
// words are vectors. Bytes are read and written once, so they are the first to leave the caches.
template <typename Word>
struct UnitInFlight {
  Word words[kUnitWords<Word>];
  char last;  // of the bytes after the last whole vector, one per lane

  __device__ void load(const char* from, int64_t size, int lane) {
    const Word* const place = reinterpret_cast<const Word*>(from) + lane;
#pragma unroll
    for (int i = 0; i < kUnitWords<Word>; ++i)
      if (word_end(i, lane) <= size) words[i] = __ldcs(place + i * kWarpLanes);
    if constexpr (kHasRest) {
      const int64_t byte = size / kVectorBytes * kVectorBytes + lane;
      if (byte < size) last = from[byte];
    }
  }

  __device__ void store(char* to, int64_t size, int lane) const {
    Word* const place = reinterpret_cast<Word*>(to) + lane;
#pragma unroll
    for (int i = 0; i < kUnitWords<Word>; ++i)
      if (word_end(i, lane) <= size) __stcs(place + i * kWarpLanes, words[i]);
    if constexpr (kHasRest) {
      const int64_t byte = size / kVectorBytes * kVectorBytes + lane;
      if (byte < size) to[byte] = last;
    }
  }

 private:
  static constexpr bool kHasRest = sizeof(Word) == kVectorBytes;
  __device__ static int64_t word_end(int i, int lane) {
    return (i * kWarpLanes + lane + 1) * static_cast<int>(sizeof(Word));
  }
};

// Zeros [begin, end), whatever their alignment, by `threads` threads of which this is number `thread`.
__device__ inline void zero_bytes(char* begin, char* end, int64_t thread, int64_t threads) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin), past = reinterpret_cast<uintptr_t>(end);
  const uintptr_t aligned = (first + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  const uintptr_t from = aligned < past ? aligned : past, to = from + (past - from) / kVectorBytes * kVectorBytes;
  for (uintptr_t place = from + thread * kVectorBytes; place < to; place += threads * kVectorBytes)
    __stcs(reinterpret_cast<uint4*>(place), uint4{});
  for (uintptr_t place = first + thread; place < from; place += threads) *reinterpret_cast<char*>(place) = 0;
  for (uintptr_t place = to + thread; place < past; place += threads) *reinterpret_cast<char*>(place) = 0;
}

// Whether every unit starts on a multiple of 16 bytes in all tensors.
inline bool vectors_fit(const StashShape& shape, std::initializer_list<const dsv4_tensor*> tensors) {
  for (const dsv4_tensor* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor->data) % kVectorBytes) return false;
  return shape.page_size * shape.row_bytes % kVectorBytes == 0;
}

// Calls function(Word{}) with the word in which units are moved.
template <typename Function>
dsv4_status with_unit_word(bool vectors, const StashShape& shape, Function&& function) {
  if (vectors) return function(uint4{});
  switch (shape.element_bytes) {
    case 8: return function(0ull);
    case 4: return function(0u);
    case 2: return function(static_cast<unsigned short>(0));
    default: return function(static_cast<unsigned char>(0));
  }
}

}  // namespace dsv4
