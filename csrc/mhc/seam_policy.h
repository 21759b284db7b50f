// How a seam is computed: which blocks project which columns of which tokens, and in how many parts a large batch.
//
// What counts, per token at hidden H: 8H bytes of streams and 2H of the sublayer's output in, 8H + 2H out; fn, 384H
// bytes, once for all tokens of a block. Few tokens: fn is most of what is read, so its columns are spread over the
// whole device, a unit of 32 per block; each writes a row of partial sums per token, 128 bytes for 768 of streams.
// Many: a block keeps the fn of several units, and sums these first. Its warps take 2 groups of 8 tokens at a time, for
// which the operands of fn are read from shared memory once.
#pragma once

#include "core/device.h"

namespace dsv4 {

constexpr int kUnitColumns = 32;  // of a warp: 4 lanes with 8 columns of each of 8 tokens
constexpr int kSumsOfToken = 32;  // of its products: the units of each are added in order, then these
constexpr int kGroupTokens = 8;   // the columns of one tensor core product
constexpr int kManyGroups = 2;    // of a warp at a time; 1 of few tokens
constexpr int kMostProjectionThreads = 512;
constexpr int kMostFinishThreads = 544;
constexpr int kManyFinishTokens = 4;  // of a block of the second kernel; 1 of few tokens

// Bytes of shared memory of the first kernel: of a unit's rows of fn, and of the group that a warp has of 8 tokens, its
// streams and its sums (which a slice of one unit does without).
struct SeamMemory {
  int unit_rows;
  int group_chunks;
  int group_sums;

  constexpr int64_t of_block(int slice_units, int sets, int groups) const {
    return int64_t{slice_units} * unit_rows +
           int64_t{sets} * slice_units * groups * (group_chunks + (slice_units == 1 ? 0 : group_sums));
  }
};

struct SeamPolicy {
  bool few;
  int slice_units;  // units of a block
  int sets;         // of warps, one per unit, that take tokens by turns
  int ranges;       // of tokens, each with blocks of its own
  int part_tokens;  // of a pair of launches: their new streams stay in L2 from the one to the other
};

constexpr int kRowBytes = 128;  // of partial sums, of a token and slice
constexpr int64_t kMostPartialBytes = 8 << 20;

constexpr int units_of(int64_t hidden) { return static_cast<int>((hidden + kUnitColumns - 1) / kUnitColumns); }
constexpr int units_of_sum(int64_t hidden) { return (units_of(hidden) + kSumsOfToken - 1) / kSumsOfToken; }

// Bytes of workspace: what the partial sums of any schedule take.
constexpr int64_t seam_workspace_bytes(int64_t tokens, int64_t hidden) {
  const int64_t of_units = tokens * units_of(hidden) * kRowBytes;
  return of_units < kMostPartialBytes ? of_units : kMostPartialBytes;
}

// From sm_90a to sm_103a as measured on an H200 (see docs/decisions/0025); on sm_120a and sm_121a, whose blocks have 99 KB
// of shared memory, derived, not measured.
constexpr SeamPolicy seam_policy(const Device& device, int64_t tokens, int64_t hidden, const SeamMemory& memory) {
  constexpr int kFewTokens = 128;  // from 256 on more is lost to partial sums than is won by more blocks
  constexpr int kPartTokens =
      2048;  // 1024, 1536, 2048 of 8192 tokens: 406, 413, 376 us at H = 4096, 735, 709, 683 at 7168
  const int units = units_of(hidden);
  const auto ranges_of = [tokens](int sets) {
    return static_cast<int>((tokens + sets * kGroupTokens - 1) / (sets * kGroupTokens));
  };
  if (tokens <= kFewTokens) {
    // Four warps have a block's fn sooner; with two there are more blocks. 64 tokens, H = 4096: 9.9 and 11.6 us; 16: 8.0
    // and 7.5. As many blocks as are resident at a time.
    const bool two = tokens > 16 && units * ranges_of(2) <= 4 * device.multiprocessors;
    const int sets = two ? 2 : 4;
    return {true, 1, sets, ranges_of(sets), static_cast<int>(tokens)};
  }
  int slice_units = units_of_sum(hidden);
  if (memory.of_block(slice_units, 1, kManyGroups) > device.shared_per_block) slice_units = 1;
  int sets = kMostProjectionThreads / (32 * slice_units);
  while (sets > 1 && memory.of_block(slice_units, sets, kManyGroups) > device.shared_per_block) --sets;
  const int slices = (units + slice_units - 1) / slice_units;
  const int ranges = device.multiprocessors / slices > 0 ? device.multiprocessors / slices : 1;
  const int64_t groups = (tokens + kGroupTokens - 1) / kGroupTokens;
  const int64_t fit = kMostPartialBytes / (slices * kRowBytes) / kGroupTokens * kGroupTokens;
  return {false, slice_units, sets, static_cast<int>(ranges < groups ? ranges : groups),
          static_cast<int>(fit < kPartTokens ? fit : kPartTokens)};
}

}  // namespace dsv4
