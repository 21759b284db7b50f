// The k best of a row that one warp holds in registers.
#pragma once

#include "device/ordered_key.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"

namespace dsv4 {

struct TopKScratch {  // shared memory of one warp
  uint64_t candidates[kWarpLanes];
  uint64_t ranked[kWarpLanes];
};

// One round for each of the k: the best of every lane's best. Right for any k up to 32 and any ties.
template <int Slots>
__device__ uint64_t warp_top_k_by_rounds(uint32_t (&keys)[Slots], int top_k, int lane) {
  uint64_t result = kNoEntry;
  for (int rank = 0; rank < top_k; ++rank) {
    uint32_t best = keys[0];
    int best_slot = 0;
#pragma unroll
    for (int slot = 1; slot < Slots; ++slot)
      if (keys[slot] < best) {
        best = keys[slot];
        best_slot = slot;
      }
    const uint32_t winner = __reduce_min_sync(kFullWarp, best);
    if (winner == kNoKey) break;
    const uint32_t own_column = best == winner ? warp_column(lane, best_slot) : kNoKey;
    const uint32_t column = __reduce_min_sync(kFullWarp, own_column);
    if (lane == rank) result = make_entry(winner, column);
    if (own_column != column) best_slot = Slots;  // not this lane's
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot)
      if (slot == best_slot) keys[slot] = kNoKey;
  }
  return result;
}

// Lane j gets the entry of rank j, kNoEntry if there are no more than j values or from top_k on. keys: of the columns
// warp_column(lane, slot), kNoKey where there is none; destroyed.
template <int Slots>
__device__ uint64_t warp_top_k(uint32_t (&keys)[Slots], int top_k, int lane, TopKScratch& scratch) {
  // Each round over the slots of a lane costs more than all else. For few results: k values are at least as good as the
  // k-th best of the lanes' best ones, and seldom many more are. Those few, one for each lane, are ranked by counting.
  constexpr int kFew = 8;
  if (top_k > kFew) return warp_top_k_by_rounds(keys, top_k, lane);

  uint32_t best = keys[0];
#pragma unroll
  for (int slot = 1; slot < Slots; ++slot) best = min(best, keys[slot]);
  uint32_t limit;
  for (int found = 0; found < top_k;) {
    limit = __reduce_min_sync(kFullWarp, best);
    const bool reached = best == limit;
    found += __popc(__ballot_sync(kFullWarp, reached));
    if (reached) best = kNoKey;
  }
  limit = min(limit, kNanKey);

  unsigned count = 0;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) count += keys[slot] <= limit;
  unsigned place = 0, total = 0;  // of this lane's first candidate; of all candidates
#pragma unroll
  for (int bit = 1; bit <= Slots; bit *= 2) {
    const unsigned lanes = __ballot_sync(kFullWarp, count & bit);
    place += __popc(lanes & ((1u << lane) - 1)) * bit;
    total += __popc(lanes) * bit;
  }
  if (total > kWarpLanes) return warp_top_k_by_rounds(keys, top_k, lane);  // many ties

#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (keys[slot] <= limit) scratch.candidates[place++] = make_entry(keys[slot], warp_column(lane, slot));
  __syncwarp();
  const uint64_t own = lane < total ? scratch.candidates[lane] : kNoEntry;
  unsigned rank = 0;
  for (unsigned i = 0; i < total; ++i) rank += scratch.candidates[i] < own;
  if (lane < total) scratch.ranked[rank] = own;
  __syncwarp();
  return lane < min(total, static_cast<unsigned>(top_k)) ? scratch.ranked[lane] : kNoEntry;
}

}  // namespace dsv4
