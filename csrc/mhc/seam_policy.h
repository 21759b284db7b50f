// How many tokens a cluster of the seam kernel takes: in groups of 8, the columns of one tensor core product.
//
// What counts, per token at hidden H: 8H bytes of streams and 2H of the sublayer's output in, 8H + 2H out. Each cluster
// reads all of fn, 384H bytes from L2, so a token costs another 384H / tokens of a cluster: 48H with 8 tokens, 12H with
// 32. A small batch has clusters to spare and wants few tokens in each, for latency; a large one wants many, up to what
// shared memory holds: 8H bytes of streams per token over the 8 blocks of a cluster, and the partial sums of its warps.
#pragma once

#include "core/device.h"

#ifdef __CUDACC__
#define DSV4_HOST_DEVICE __host__ __device__
#else
#define DSV4_HOST_DEVICE
#endif

namespace dsv4 {

constexpr int kClusterBlocks = 8;  // as many as every architecture grants
constexpr int kSegments = 16;      // parts of the streams' columns, whose sums are added in one order
constexpr int kSegmentsOfBlock = kSegments / kClusterBlocks;
constexpr int kMostSegmentWarps = 7;  // with the warp of the coefficients at most 15: a thread may have 128 registers
constexpr int kUnitColumns = 32;      // of a step of a warp: 4 lanes with 8 columns of each of 8 tokens
constexpr int kGroupTokens = 8;
constexpr int kMostGroups = 4;

// How the columns are spread, by `hidden` alone: the order of every sum follows from it.
struct SeamColumns {
  int segment_units;  // units of a segment
  int segment_warps;
  int rounds;  // units of a warp
};

constexpr SeamColumns seam_columns(int64_t hidden) {
  const int units = static_cast<int>((hidden + kUnitColumns - 1) / kUnitColumns);
  const int segment_units = (units + kSegments - 1) / kSegments;
  const int rounds = (segment_units + kMostSegmentWarps - 1) / kMostSegmentWarps;
  return {segment_units, (segment_units + rounds - 1) / rounds, rounds};
}

// Of a warp: the columns of x that it has, and in their place later its partial sums.
DSV4_HOST_DEVICE constexpr int seam_scratch_bytes(const SeamColumns& columns, int groups, int values) {
  const int x = columns.rounds * kUnitColumns * 2, sums = values * 4;  // per token
  return (x > sums ? x : sums) * groups * kGroupTokens;
}

// Dynamic shared memory of a block: of each warp, its columns of the streams, and the above.
constexpr int64_t seam_shared_bytes(const SeamColumns& columns, int groups, int values) {
  const int64_t streams = columns.rounds * groups * kGroupTokens * 4 * kUnitColumns * 2;
  return columns.segment_warps * kSegmentsOfBlock * (streams + seam_scratch_bytes(columns, groups, values));
}

struct SeamPolicy {
  int groups;  // of 8 tokens per cluster
};

// Derived, not measured on any device: as few tokens per cluster as leave one wave, at most what fits. static_shared: of a block of
// the kernel with kMostGroups, in bytes.
constexpr SeamPolicy seam_policy(const Device& device, int64_t tokens, int64_t hidden, int values,
                                 int64_t static_shared) {
  const int64_t clusters = device.multiprocessors / kClusterBlocks > 0 ? device.multiprocessors / kClusterBlocks : 1;
  const SeamColumns columns = seam_columns(hidden);
  int groups = 1;
  while (groups < kMostGroups && clusters * groups * kGroupTokens < tokens &&
         seam_shared_bytes(columns, groups + 1, values) + static_shared <= device.shared_per_block)
    ++groups;
  return {groups};
}

}  // namespace dsv4
