// The k best of a row that the lanes of a group, a warp or half of one, hold in registers.
#pragma once

#include "device/ordered_key.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"

namespace dsv4 {

constexpr int kFewResults = 8;  // up to which the results are found by counting; no more than kBests
constexpr int kBests = 16;

template <int Lanes>
struct TopKScratch {  // shared memory of a group
  uint64_t candidates[Lanes];
  uint64_t ranked[Lanes];
  float bests[kBests];
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

// The group's lanes for which the predicate holds, from bit 0 on.
template <int Lanes>
__device__ inline unsigned ballot_of_group(bool predicate) {
  const unsigned lanes = __ballot_sync(kFullWarp, predicate);
  return lanes >> (threadIdx.x & (kWarpLanes - Lanes)) & kFullWarp >> (kWarpLanes - Lanes);
}

// One round for each of the k: the best of every lane's best. Right for any k up to Lanes and any ties.
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

// Lane j gets the column of rank j, and its payload; kNoColumn if there are no more than j columns or from top_k on.
// Best is the largest value, of equal ones the lowest column; NaN is behind every number. Every lane of the warp must
// call it.
//
// values: of the columns group_column(lane, slot); NaN from `length` on. row: the same in shared memory, by column.
// payloads: likewise, what is wanted of the chosen columns; may be `row`.
template <int Lanes, int Slots>
__device__ Chosen group_top_k(const float (&values)[Slots], int length, int top_k, int lane, const float* row,
                              const float* payloads, TopKScratch<Lanes>& scratch) {
  // Each round over the slots of a lane costs more than all else. For few results: k values are at least as good as the
  // k-th best of 16 parts' best ones, and seldom many more are. Those few, one for each lane, are ranked by counting.
  if (top_k > kFewResults) return group_top_k_by_rounds<Lanes>(values, length, top_k, lane, payloads);

  float best = -INFINITY;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) best = fmaxf(best, values[slot]);  // fmaxf passes NaN over
  if constexpr (Lanes > kBests) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 1));
  scratch.bests[lane / (Lanes / kBests)] = best;
  __syncwarp();
  int better = 0;
#pragma unroll
  for (int i = 0; i < kBests; i += kFour) {
    const Four<float> four = *reinterpret_cast<const Four<float>*>(scratch.bests + i);
#pragma unroll
    for (const float other : four.values) better += other > best;
  }
  // The least of those that fewer than k are better than.
  float limit = better < top_k ? best : INFINITY;
  if constexpr (Lanes == kWarpLanes) {
    limit = value_of_key(__reduce_max_sync(kFullWarp, descending_key(limit)));
  } else {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2)
      limit = fminf(limit, __shfl_xor_sync(kFullWarp, limit, distance));
  }

  uint32_t reached = 0;  // a bit for each slot
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (values[slot] >= limit) reached |= 1u << slot;
  // Place of this lane's first candidate, and how many there are of all.
  const int count = __popc(reached);
  int place = 0, total = 0;
#pragma unroll
  for (int bit = 1; bit <= 4; bit *= 2) {
    const unsigned lanes = ballot_of_group<Lanes>(count & bit);
    place += __popc(lanes & ((1u << lane) - 1)) * bit;
    total += __popc(lanes) * bit;
  }
  // Many equal values, or few numbers.
  if (__any_sync(kFullWarp, count >= 8 || total > Lanes || total < min(top_k, length)))
    return group_top_k_by_rounds<Lanes>(values, length, top_k, lane, payloads);

  for (; reached; reached &= reached - 1) {
    const uint32_t column = group_column<Lanes>(lane, __ffs(reached) - 1);
    scratch.candidates[place++] = make_entry(descending_key(row[column]), column);
  }
  __syncwarp();
  uint64_t own = kNoEntry;
  float payload = 0.0f;
  if (lane < total) {
    own = scratch.candidates[lane];
    payload = payloads[entry_column(own)];
  }
  int rank = 0;
  for (int i = 0; i < total; ++i) rank += scratch.candidates[i] < own;
  if (lane < total) scratch.ranked[rank] = make_entry(__float_as_uint(payload), entry_column(own));
  __syncwarp();
  Chosen chosen = {kNoColumn, 0.0f};
  if (lane < min(total, top_k)) {
    const uint64_t ranked = scratch.ranked[lane];
    chosen = {entry_column(ranked), __uint_as_float(entry_key(ranked))};
  }
  return chosen;
}

}  // namespace dsv4
