// Top-k of a row that a group of lanes (a warp or half of one) holds in registers.
#pragma once

#include "device/ordered_key.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"

namespace dsv4 {

// For k results a row is divided into at least 2 k parts: 16, or with a whole warp also 32 and 64.
constexpr int kFewResults = 8;
constexpr int kFewParts = 2 * kFewResults;
constexpr int kMostParts = 2 * kWarpLanes;

template <int Lanes>
struct TopKScratch {  // shared memory per group
  static constexpr int kParts = Lanes == kWarpLanes ? kMostParts : kFewParts;
  uint64_t candidates[kParts];
  uint64_t ranked[Lanes];
  float bests[kParts];
};

constexpr uint32_t kNoColumn = 0xffffffffu;

struct Chosen {
  uint32_t column;  // or kNoColumn
  float payload;
};

template <int Lanes>
__device__ inline uint32_t lowest_of_group(uint32_t value) {
  if constexpr (Lanes == kWarpLanes) {
    return __reduce_min_sync(kFullWarp, value);
  } else {
    for (int distance = Lanes / 2; distance > 0; distance /= 2)
      value = min(value, __shfl_xor_sync(kFullWarp, value, distance));
    return value;
  }
}

// Ballot within the group: the lanes for which the predicate holds, from bit 0 on.
template <int Lanes>
__device__ inline unsigned ballot_of_group(bool predicate) {
  const unsigned lanes = __ballot_sync(kFullWarp, predicate);
  return lanes >> (threadIdx.x & (kWarpLanes - Lanes)) & kFullWarp >> (kWarpLanes - Lanes);
}

// k rounds, each taking the best of every lane's best. Correct for any k up to Lanes and any ties.
template <int Lanes, int Slots>
__device__ Chosen group_top_k_by_rounds(const float (&values)[Slots], int length, int top_k, int lane,
                                        const float* payloads) {
  uint32_t keys[Slots];
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    keys[slot] = group_column<Lanes>(lane, slot) < length ? descending_key(values[slot]) : kNoKey;
  uint32_t chosen = kNoColumn;
  for (int rank = 0; rank < top_k; ++rank) {
    uint32_t best = keys[0];
    int best_slot = 0;
#pragma unroll
    for (int slot = 1; slot < Slots; ++slot)
      if (keys[slot] < best) {
        best = keys[slot];
        best_slot = slot;
      }
    const uint32_t winner = lowest_of_group<Lanes>(best);
    const bool is_own = best == winner && winner != kNoKey;
    const uint32_t own_column = is_own ? group_column<Lanes>(lane, best_slot) : kNoColumn;
    const uint32_t column = lowest_of_group<Lanes>(own_column);
    if (lane == rank) chosen = column;
    if (!is_own || own_column != column) best_slot = Slots;  // not this lane's
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot)
      if (slot == best_slot) keys[slot] = kNoKey;
  }
  return {chosen, chosen == kNoColumn ? 0.0f : payloads[chosen]};
}

// A threshold that at least k columns reach, and rarely many more: the k-th largest of the parts' maxima. -inf if fewer
// than k parts have one. k is at most Parts.
template <int Lanes, int Parts, int Slots>
__device__ inline float limit_of_best(const float (&values)[Slots], int top_k, int lane, float* bests) {
  constexpr int kLaneParts = Parts > Lanes ? Parts / Lanes : 1;  // parts per lane
  constexpr int kPartLanes = Parts > Lanes ? 1 : Lanes / Parts;  // lanes per part, 1 or 2
  float own[kLaneParts];
#pragma unroll
  for (float& best : own) best = -INFINITY;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    float& best = own[slot * kLaneParts / Slots];
    best = fmaxf(best, values[slot]);  // fmaxf ignores NaN
  }
  if constexpr (kPartLanes == 2) own[0] = fmaxf(own[0], __shfl_xor_sync(kFullWarp, own[0], 1));
#pragma unroll
  for (int i = 0; i < kLaneParts; ++i) bests[lane / kPartLanes * kLaneParts + i] = own[i];
  __syncwarp();
  int better[kLaneParts] = {};
#pragma unroll
  for (int i = 0; i < Parts; i += kFour) {
    const Four<float> four = *reinterpret_cast<const Four<float>*>(bests + i);
#pragma unroll
    for (const float other : four.values)
#pragma unroll
      for (int part = 0; part < kLaneParts; ++part) better[part] += other > own[part];
  }
  // The smallest of those that fewer than k exceed.
  float limit = better[0] < top_k ? own[0] : INFINITY;
#pragma unroll
  for (int part = 1; part < kLaneParts; ++part)
    if (better[part] < top_k) limit = fminf(limit, own[part]);
  if constexpr (Lanes == kWarpLanes) {
    limit = value_of_key(__reduce_max_sync(kFullWarp, descending_key(limit)));
  } else {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2)
      limit = fminf(limit, __shfl_xor_sync(kFullWarp, limit, distance));
  }
  return limit;
}

// As group_top_k(), for up to Parts results: the few columns that reach limit_of_best() are ranked by counting. Returns
// false, for the whole warp, if they are too many (many equal values) or too few (many NaN).
template <int Lanes, int Parts, int Slots>
__device__ bool group_top_k_by_parts(const float (&values)[Slots], int length, int top_k, int lane, const float* row,
                                     const float* payloads, TopKScratch<Lanes>& scratch, Chosen* chosen) {
  constexpr int kEach = Parts > kFewParts ? 2 : 1;         // candidates ranked per lane
  constexpr int kMostOfLane = Parts > kFewParts ? 15 : 7;  // columns per lane, rarely more
  const float limit = limit_of_best<Lanes, Parts>(values, top_k, lane, scratch.bests);
  uint32_t reached = 0;  // one bit per slot
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (values[slot] >= limit) reached |= 1u << slot;
  // Index of this lane's first candidate, and the total number of candidates.
  const int count = __popc(reached);
  int place = 0, total = 0;
#pragma unroll
  for (int bit = 1; bit <= kMostOfLane; bit *= 2) {
    const unsigned lanes = ballot_of_group<Lanes>(count & bit);
    place += __popc(lanes & ((1u << lane) - 1)) * bit;
    total += __popc(lanes) * bit;
  }
  if (__any_sync(kFullWarp, count > kMostOfLane || total > Lanes * kEach || total < min(top_k, length))) return false;

  for (; reached; reached &= reached - 1) {
    const uint32_t column = group_column<Lanes>(lane, __ffs(reached) - 1);
    scratch.candidates[place++] = make_entry(descending_key(row[column]), column);
  }
  __syncwarp();
  uint64_t own[kEach];
  float payload[kEach] = {};
  int rank[kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = kNoEntry;
    if (lane + i * Lanes < total) {
      own[i] = scratch.candidates[lane + i * Lanes];
      payload[i] = payloads[entry_column(own[i])];
    }
  }
  for (int other = 0; other < total; ++other) {
    const uint64_t entry = scratch.candidates[other];
#pragma unroll
    for (int i = 0; i < kEach; ++i) rank[i] += entry < own[i];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (lane + i * Lanes < total && (kEach == 1 || rank[i] < Lanes))
      scratch.ranked[rank[i]] = make_entry(__float_as_uint(payload[i]), entry_column(own[i]));
  __syncwarp();
  *chosen = {kNoColumn, 0.0f};
  if (lane < min(total, top_k)) {
    const uint64_t ranked = scratch.ranked[lane];
    *chosen = {entry_column(ranked), __uint_as_float(entry_key(ranked))};
  }
  return true;
}

// Lane j gets the column of rank j, and its payload; kNoColumn if there are no more than j columns or from top_k on.
// Order: descending by value, equal values by the lower column, NaN after every number. Every lane of the warp must
// call it.
//
// values: of the columns group_column(lane, slot); NaN from `length` on. row: the same in shared memory, by column.
// payloads: in shared memory, by column: what is returned of the chosen columns; may be `row`.
template <int Lanes, int Slots>
__device__ Chosen group_top_k(const float (&values)[Slots], int length, int top_k, int lane, const float* row,
                              const float* payloads, TopKScratch<Lanes>& scratch) {
  constexpr bool kMany = TopKScratch<Lanes>::kParts == kMostParts;
  Chosen chosen;
  bool found;
  if (!kMany || top_k <= kFewResults)
    found = group_top_k_by_parts<Lanes, kFewParts>(values, length, top_k, lane, row, payloads, scratch, &chosen);
  else if (top_k <= kMostParts / 4)
    found = group_top_k_by_parts<Lanes, kMostParts / 2>(values, length, top_k, lane, row, payloads, scratch, &chosen);
  else
    found = group_top_k_by_parts<Lanes, kMostParts>(values, length, top_k, lane, row, payloads, scratch, &chosen);
  return found ? chosen : group_top_k_by_rounds<Lanes>(values, length, top_k, lane, payloads);
}

}  // namespace dsv4
