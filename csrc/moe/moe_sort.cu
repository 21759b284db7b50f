#include <dsv4/moe.h>

#include <algorithm>

#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "device/divide.cuh"
#include "device/reduce.cuh"
#include "device/scan.cuh"
#include "moe/moe_sort_policy.h"
#include "moe/tiles.h"

namespace dsv4 {

constexpr int kItems = 6;          // slots per thread and round
constexpr int kClusterBlocks = 8;  // as many as every device grants

struct Route {
  int32_t* tile_to_expert;
  int32_t* tile_rows;
  int32_t* row_to_slot;
  int32_t* slot_to_row;
  int32_t* counts;
  int32_t slots;
  int32_t part;   // slots of a block, a multiple of a warp's lanes
  int32_t tiles;  // room in the tile tables
  uint32_t experts;
  int32_t tile_size;
  int32_t tile_shift;         // its logarithm
  Divisor top_k;              // slots of a token
  int64_t gap;                // between the ids of one token and those of the next
  uint64_t first_expert;      // 0 with a map
  const int32_t* expert_map;  // local experts of ids
  int64_t mapped_ids;         // -1: there is no map
};

constexpr int32_t kNone = -1;

template <typename Id>
__device__ int32_t local_expert(const Id* ids, int32_t slot, int32_t end, const Route& route) {
  if (slot >= end) return kNone;
  const int64_t place = route.gap ? slot + route.top_k.quotient(slot) * route.gap : slot;
  // Unsigned: an id below the first expert wraps round to a large one.
  uint64_t expert = static_cast<uint64_t>(static_cast<int64_t>(ids[place])) - route.first_expert;
  if (route.mapped_ids >= 0) {
    if (expert >= static_cast<uint64_t>(route.mapped_ids)) return kNone;
    expert = static_cast<uint64_t>(static_cast<int64_t>(route.expert_map[expert]));
  }
  return expert < route.experts ? static_cast<int32_t>(expert) : kNone;
}

// The last expert whose tiles begin at `tile` or before: experts without tiles begin where the next one does.
template <int Experts>
__device__ int32_t expert_of(int32_t tile, const int32_t (&first_tile)[Experts]) {
  int32_t expert = 0;
#pragma unroll
  for (int32_t step = Experts / 2; step > 0; step /= 2)
    if (first_tile[expert + step] <= tile) expert += step;
  return expert;
}

// The slots that a block sorts: all of them, or its part of them in a cluster. It takes them in rounds of at most
// kThreads * kItems. In a round each warp ranks a run of consecutive slots, so rows follow the order of the slots.
template <int Warps>
struct Part {
  static constexpr int kThreads = Warps * kWarpLanes;
  int32_t begin, end;

  __device__ __forceinline__ explicit Part(const Route& route)
      : begin(blockIdx.x * route.part), end(min(begin + route.part, route.slots)) {}

  // Slots per thread of the round that starts at slot `round`.
  __device__ __forceinline__ int32_t items(int32_t round) const {
    return min(kItems, (end - round + kThreads - 1) / kThreads);
  }
  // This thread's first slot of it; the others follow at a distance of kWarpLanes.
  __device__ __forceinline__ int32_t first(int32_t round) const {
    return round + static_cast<int>(threadIdx.x / kWarpLanes) * items(round) * kWarpLanes +
           static_cast<int>(threadIdx.x % kWarpLanes);
  }
};

// A thread's slots of a round.
struct RoundSlots {
  int32_t expert[kItems];  // kNone: not a local one, or no slot
  int32_t rank[kItems];    // among the warp's slots of this expert
};

// Ranks a round's slots. ranks: first each warp's slots per expert so far, in the end how many the earlier warps have.
// counts: the round's slots of this thread's own experts.
template <int Warps, int ExpertsOfThread, typename Id, int Experts>
__device__ __forceinline__ void rank_slots(const Id* ids, const Route& route, const Part<Warps>& part, int32_t round,
                                           uint16_t (&ranks)[Warps][Experts], RoundSlots& slots,
                                           int32_t (&counts)[ExpertsOfThread]) {
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const uint32_t own_experts = threadIdx.x * ExpertsOfThread;
  const int32_t items = part.items(round), first = part.first(round);
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    slots.expert[i] = i < items ? local_expert(ids, first + i * kWarpLanes, part.end, route) : kNone;
#pragma unroll
  for (int i = 0; i < ExpertsOfThread; ++i)
#pragma unroll
    for (int w = 0; w < Warps; ++w) ranks[w][own_experts + i] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i >= items) break;
    const int32_t expert = slots.expert[i];
    const unsigned peers = __match_any_sync(kFullWarp, expert);
    const int32_t earlier = expert >= 0 ? ranks[warp][expert] : 0;
    slots.rank[i] = earlier + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (expert >= 0 && lane == __ffs(peers) - 1) ranks[warp][expert] = static_cast<uint16_t>(earlier + __popc(peers));
    __syncwarp();
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ExpertsOfThread; ++i) {
    uint16_t of_warp[Warps];
#pragma unroll
    for (int w = 0; w < Warps; ++w) of_warp[w] = ranks[w][own_experts + i];
    counts[i] = 0;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      ranks[w][own_experts + i] = static_cast<uint16_t>(counts[i]);
      counts[i] += of_warp[w];
    }
  }
}

// Counts the part's slots by expert.
template <int Warps, int ExpertsOfThread, typename Id, int Experts>
__device__ __forceinline__ void count_slots(const Id* ids, const Route& route, const Part<Warps>& part,
                                            int32_t (&count)[Experts]) {
#pragma unroll
  for (int i = 0; i < ExpertsOfThread; ++i) count[threadIdx.x * ExpertsOfThread + i] = 0;
  __syncthreads();
  for (int32_t slot = part.begin + threadIdx.x; slot < part.end; slot += Warps * kWarpLanes) {
    const int32_t e = local_expert(ids, slot, part.end, route);
    if (e >= 0) atomicAdd(&count[e], 1);
  }
  __syncthreads();
}

// Adds up the blocks' counts of this thread's experts: of all blocks, and of those before this one. In a cluster, a
// __cluster_barrier_wait() must follow before the block ends: until then others read its counts.
template <int ExpertsOfThread, int Experts>
__device__ __forceinline__ void exchange_counts(int32_t (&count)[Experts], int32_t (&before)[ExpertsOfThread],
                                                int32_t (&all)[ExpertsOfThread]) {
  const uint32_t own_experts = threadIdx.x * ExpertsOfThread;
  if (gridDim.x == 1) {
#pragma unroll
    for (int i = 0; i < ExpertsOfThread; ++i) all[i] = count[own_experts + i];
  } else {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
#pragma unroll
    for (uint32_t block = 0; block < kClusterBlocks; ++block) {
      const auto* there = static_cast<const int32_t*>(__cluster_map_shared_rank(count, block));
#pragma unroll
      for (int i = 0; i < ExpertsOfThread; ++i) {
        const int32_t slots = there[own_experts + i];
        all[i] += slots;
        if (block < blockIdx.x) before[i] += slots;
      }
    }
    __cluster_barrier_arrive();  // this thread reads no other block's memory any more
  }
}

// Stores the rows of a round's slots, and the slots of these rows.
template <int Warps, int Experts>
__device__ __forceinline__ void store_rows(const Route& route, const Part<Warps>& part, int32_t round,
                                           const RoundSlots& slots, const int32_t (&next_row)[Experts],
                                           const uint16_t (&ranks)[Warps][Experts]) {
  const int warp = threadIdx.x / kWarpLanes;
  const int32_t items = part.items(round), first = part.first(round);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t slot = first + i * kWarpLanes;
    if (i >= items || slot >= part.end) break;
    int32_t row = kNone;
    if (slots.expert[i] >= 0) {
      row = next_row[slots.expert[i]] + ranks[warp][slots.expert[i]] + slots.rank[i];
      route.row_to_slot[row] = slot;
    }
    route.slot_to_row[slot] = row;
  }
}

// Stores the blocks' shares of the tile tables, one thread per tile, and marks the padding rows behind each expert's
// last one, one thread per row.
template <int Threads, int Experts>
__device__ __forceinline__ void store_tile_tables(const Route& route, int32_t all_tiles,
                                                  const int32_t (&total)[Experts], const int32_t (&first_tile)[Experts],
                                                  int32_t (&rows_of_tile)[Threads]) {
  const int32_t tiles_of_block = (route.tiles + gridDim.x - 1) / gridDim.x;
  const int32_t tiles_end = min(static_cast<int32_t>(blockIdx.x + 1) * tiles_of_block, route.tiles);
  for (int32_t from = blockIdx.x * tiles_of_block; from < tiles_end; from += Threads) {
    const int32_t tiles = min(Threads, tiles_end - from), own_tile = from + threadIdx.x;
    if (threadIdx.x < tiles) {
      const bool used = own_tile < all_tiles;
      const int32_t expert = used ? expert_of<Experts>(own_tile, first_tile) : kNone;
      int32_t rows = 0;
      if (used) rows = min(route.tile_size, total[expert] - (own_tile - first_tile[expert]) * route.tile_size);
      route.tile_to_expert[own_tile] = expert;
      route.tile_rows[own_tile] = rows;
      rows_of_tile[threadIdx.x] = used ? rows : route.tile_size;  // rows of unused tiles are not written
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < tiles << route.tile_shift; i += Threads)
      if ((i & (route.tile_size - 1)) >= rows_of_tile[i >> route.tile_shift])
        route.row_to_slot[(static_cast<int64_t>(from) << route.tile_shift) + i] = kNone;
    __syncthreads();
  }
}

// One block, or one cluster whose blocks take a part of the slots each. A thread adds up the counts of
// ExpertsOfThread experts, its own.
template <int Warps, int ExpertsOfThread, bool OneRound, typename Id>
__global__ void __launch_bounds__(Warps* kWarpLanes, 1) moe_sort_kernel(const Id* __restrict__ ids, Route route) {
  await_previous_grid();
  constexpr int kThreads = Warps * kWarpLanes;
  constexpr int kExperts = kThreads * ExpertsOfThread;
  static_assert(kThreads * kItems < 65536, "ranks inside a round are 16 bits wide");
  __shared__ uint16_t ranks[Warps][kExperts];  // of a round, see rank_slots()
  __shared__ int32_t count[kExperts];          // slots of this block
  __shared__ int32_t total[kExperts];          // slots of all blocks
  __shared__ int32_t first_tile[kExperts];
  __shared__ int32_t next_row[kExperts];  // of this block's slots in this round
  __shared__ int32_t rows_of_tile[kThreads];
  __shared__ uint32_t sum_of_warp[Warps];
  const uint32_t own_experts = threadIdx.x * ExpertsOfThread;
  const Part<Warps> part(route);
  RoundSlots slots;
  int32_t round_counts[ExpertsOfThread];

  // Count. A single round is ranked at once, which counts too.
  if constexpr (OneRound) {
    rank_slots(ids, route, part, part.begin, ranks, slots, round_counts);
#pragma unroll
    for (int i = 0; i < ExpertsOfThread; ++i) count[own_experts + i] = round_counts[i];
  } else {
    count_slots<Warps, ExpertsOfThread>(ids, route, part, count);
  }

  // Exchange counts, and find each expert's first tile and this block's first row of it.
  int32_t before[ExpertsOfThread] = {}, all[ExpertsOfThread] = {};
  exchange_counts(count, before, all);
  uint32_t own_tiles = 0, own_slots = 0;
#pragma unroll
  for (int i = 0; i < ExpertsOfThread; ++i) {
    own_tiles += (all[i] + route.tile_size - 1) >> route.tile_shift;
    own_slots += all[i];
  }
  uint32_t tile_count, all_slots;
  uint32_t tile = sum_before<kThreads>(own_tiles, sum_of_warp, &tile_count);
  const int32_t all_tiles = static_cast<int32_t>(tile_count);
  sum_before<kThreads>(own_slots, sum_of_warp, &all_slots);
#pragma unroll
  for (int i = 0; i < ExpertsOfThread; ++i) {
    const uint32_t e = own_experts + i;
    total[e] = all[i];
    first_tile[e] = tile;
    next_row[e] = tile * route.tile_size + before[i];
    tile += (all[i] + route.tile_size - 1) >> route.tile_shift;
  }

  // Rank.
  for (int32_t round = part.begin; round < part.end; round += kThreads * kItems) {
    if constexpr (!OneRound) rank_slots(ids, route, part, round, ranks, slots, round_counts);
    __syncthreads();
    store_rows(route, part, round, slots, next_row, ranks);
    if (OneRound || round + kThreads * kItems >= part.end) break;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ExpertsOfThread; ++i) next_row[own_experts + i] += round_counts[i];
  }
  __syncthreads();  // totals and first tiles are stored, in a block without slots too

  // Tables.
  store_tile_tables(route, all_tiles, total, first_tile, rows_of_tile);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    route.counts[0] = all_tiles;
    route.counts[1] = all_slots;
  }
  if (gridDim.x > 1) __cluster_barrier_wait();  // no block ends while another reads its counts
}

constexpr int kFewSlots = kWarpLanes;
constexpr int kFewWarps = 4;

// Up to kFewSlots slots: one lane per slot, and shuffles instead of tables over all experts. Every warp computes
// everything; the first one stores it, and all share the padding rows.
template <typename Id>
__global__ void __launch_bounds__(kFewWarps* kWarpLanes) moe_sort_few_kernel(const Id* __restrict__ ids, Route route) {
  await_previous_grid();
  __shared__ int32_t rows_of_tile[kFewWarps][kFewSlots];
  __shared__ int32_t expert_of_tile[kFewSlots];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int32_t expert = local_expert(ids, lane, route.slots, route);
  const unsigned peers = __match_any_sync(kFullWarp, expert);
  const int32_t rank = __popc(peers & ((1u << lane) - 1));
  // The first slot of each expert represents it. With so few slots an expert has one tile or two.
  const bool stands = expert >= 0 && rank == 0;
  const int32_t own_tiles = stands ? (__popc(peers) + route.tile_size - 1) >> route.tile_shift : 0;
  const uint32_t key = stands ? static_cast<uint32_t>(expert) << 2 | own_tiles : ~0u << 2;
  int32_t first_tile = 0;
#pragma unroll
  for (int i = 0; i < kFewSlots; ++i) {
    const uint32_t other = __shfl_sync(kFullWarp, key, i);
    if (other >> 2 < static_cast<uint32_t>(expert)) first_tile += other & 3;
  }
  const int32_t all_tiles = __reduce_add_sync(kFullWarp, own_tiles);
  for (int32_t i = 0; i < own_tiles; ++i) {
    rows_of_tile[warp][first_tile + i] = min(__popc(peers) - i * route.tile_size, route.tile_size);
    if (warp == 0) expert_of_tile[first_tile + i] = expert;
  }
  __syncwarp();
  if (warp == 0) {
    const int32_t row = expert >= 0 ? first_tile * route.tile_size + rank : kNone;
    if (expert >= 0) route.row_to_slot[row] = lane;
    if (lane < route.slots) route.slot_to_row[lane] = row;
    if (lane < route.tiles) {
      route.tile_to_expert[lane] = lane < all_tiles ? expert_of_tile[lane] : kNone;
      route.tile_rows[lane] = lane < all_tiles ? rows_of_tile[warp][lane] : 0;
    }
    const int32_t all_slots = __popc(__ballot_sync(kFullWarp, expert >= 0));
    if (lane == 0) {
      route.counts[0] = all_tiles;
      route.counts[1] = all_slots;
    }
  }
  for (int32_t row = threadIdx.x; row < all_tiles << route.tile_shift; row += kFewWarps * kWarpLanes)
    if ((row & (route.tile_size - 1)) >= rows_of_tile[warp][row >> route.tile_shift]) route.row_to_slot[row] = kNone;
}

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxSlots = int64_t{1} << 30;  // rows with their padding still fit in 31 bits

constexpr MoeSortLimits kLimits = {kFewSlots, kItems, kWarpLanes, kClusterBlocks};

template <int Warps, int ExpertsOfThread, bool OneRound>
static dsv4_status launch_sort(const LaunchTarget& target, const dsv4_tensor& ids, const Route& route,
                               uint32_t blocks) {
  return with_index_type(ids.dtype, [&](auto id) {
    using Id = decltype(id);
    const Geometry geometry = {blocks, Warps * kWarpLanes, 0, blocks};
    return launch<moe_sort_kernel<Warps, ExpertsOfThread, OneRound, Id>>(target, geometry,
                                                                         static_cast<const Id*>(ids.data), route);
  });
}
}  // namespace dsv4

extern "C" int64_t dsv4_moe_sort_max_tiles(int64_t slots, int64_t local_experts, int64_t tile_size) {
  if (slots <= 0 || local_experts <= 0 || tile_size <= 0) return 0;
  return slots <= local_experts ? slots : (slots + (tile_size - 1) * local_experts) / tile_size;
}

extern "C" dsv4_status dsv4_moe_sort(const dsv4_moe_sort_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_sort");
  const dsv4_moe_sort_args args = check.read(given);
  const int64_t tokens = extent(args.topk_ids, 0);
  const int64_t top_k = extent(args.topk_ids, 1);
  check.tensor("topk_ids", args.topk_ids, one_of(DSV4_INT32, DSV4_INT64), {kAny, kAny}, Layout::kStridedRows);
  check.range("topk_ids columns (top_k)", top_k, 1, DSV4_MAX_TOP_K);
  check.range("topk_ids elements", saturating_product(tokens, top_k), 0, kMaxSlots);
  check.range("local_experts", args.local_experts, 1, kMaxExperts);
  check.require(is_tile_size(args.tile_size), "tile_size", "16, 32, 64 or 128", args.tile_size);
  check.range("experts_start_idx", args.experts_start_idx, 0, INT32_MAX);
  check.optional_tensor("expert_map", args.expert_map, one_of(DSV4_INT32), {kAny});
  if (present(args.expert_map))
    check.require(args.experts_start_idx == 0, "experts_start_idx", "0 with expert_map", args.experts_start_idx);
  const int64_t slots = std::min<int64_t>(saturating_product(tokens, top_k), kMaxSlots);
  const int64_t tiles = dsv4_moe_sort_max_tiles(slots, args.local_experts, args.tile_size);
  check.tensor("out_tile_to_expert", args.out_tile_to_expert, one_of(DSV4_INT32), {tiles});
  check.tensor("out_tile_rows", args.out_tile_rows, one_of(DSV4_INT32), {tiles});
  check.tensor("out_row_to_slot", args.out_row_to_slot, one_of(DSV4_INT32), {tiles * args.tile_size});
  check.tensor("out_slot_to_row", args.out_slot_to_row, one_of(DSV4_INT32), {tokens, top_k});
  check.tensor("out_counts", args.out_counts, one_of(DSV4_INT32), {2});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  Route route = {};
  route.tile_to_expert = static_cast<int32_t*>(args.out_tile_to_expert.data);
  route.tile_rows = static_cast<int32_t*>(args.out_tile_rows.data);
  route.row_to_slot = static_cast<int32_t*>(args.out_row_to_slot.data);
  route.slot_to_row = static_cast<int32_t*>(args.out_slot_to_row.data);
  route.counts = static_cast<int32_t*>(args.out_counts.data);
  route.slots = static_cast<int32_t>(tokens * top_k);
  route.tiles = static_cast<int32_t>(tiles);
  route.experts = static_cast<uint32_t>(args.local_experts);
  route.tile_size = args.tile_size;
  route.top_k = Divisor(static_cast<uint32_t>(top_k));
  route.gap = tokens > 1 ? args.topk_ids.stride[0] - top_k : 0;
  while (1 << route.tile_shift < args.tile_size) ++route.tile_shift;
  route.first_expert = static_cast<uint64_t>(args.experts_start_idx);
  route.expert_map = static_cast<const int32_t*>(args.expert_map.data);
  route.mapped_ids = present(args.expert_map) ? extent(args.expert_map, 0) : -1;
  const MoeSortPolicy policy = moe_sort_policy(*target.device, kLimits, route.slots, args.local_experts);
  route.part = policy.part;
  if (policy.few)
    return with_index_type(args.topk_ids.dtype, [&](auto id) {
      using Id = decltype(id);
      return launch<moe_sort_few_kernel<Id>>(target, {1, kFewWarps * kWarpLanes},
                                             static_cast<const Id*>(args.topk_ids.data), route);
    });
  const dsv4_tensor& ids = args.topk_ids;
  if (policy.thread_experts == 1) {
    if (policy.warps == 8) return launch_sort<8, 1, true>(target, ids, route, policy.blocks);
    return policy.one_round ? launch_sort<16, 1, true>(target, ids, route, policy.blocks)
                            : launch_sort<16, 1, false>(target, ids, route, policy.blocks);
  }
  return policy.one_round ? launch_sort<8, 4, true>(target, ids, route, policy.blocks)
                          : launch_sort<8, 4, false>(target, ids, route, policy.blocks);
}
