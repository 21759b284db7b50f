#include <dsv4/moe.h>

#include <algorithm>

#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "device/reduce.cuh"

namespace dsv4 {

constexpr int kItems = 6;  // slots of a thread: 1024 tokens of 6 slots fill one block of 1024 threads

struct Route {
  int32_t* tile_to_expert;
  int32_t* tile_rows;
  int32_t* row_to_slot;
  int32_t* slot_to_row;
  int32_t* counts;
  int32_t slots;
  int32_t tiles;  // room in the tile tables
  uint32_t experts;
  int32_t tile_size;
  uint64_t first_expert;
};

constexpr int32_t kNone = -1;

template <typename Id>
__device__ int32_t local_expert(const Id* ids, int32_t slot, const Route& route) {
  if (slot >= route.slots) return kNone;
  // Unsigned: what lies below the first expert becomes large, whatever it is.
  const uint64_t expert = static_cast<uint64_t>(static_cast<int64_t>(ids[slot])) - route.first_expert;
  return expert < route.experts ? static_cast<int32_t>(expert) : kNone;
}

// Sum of `value` over the threads before this one; every thread of the block must call it.
template <int Warps>
__device__ int32_t sum_before(int32_t value, int32_t (&of_warp)[Warps], int32_t* total) {
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  int32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarpLanes - 1) of_warp[warp] = sum;
  __syncthreads();
  int32_t before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < Warps; ++i) {
    if (i == warp) before = all;
    all += of_warp[i];
  }
  *total = all;
  return before + sum - value;
}

// Each block ranks its own part of the slots, a warp a run of them, and counts all other parts: so no block waits for
// another, one launch does for any batch, and ranks follow the slots' order whatever order blocks run in.
template <int Experts, int Warps, typename Id>
__global__ void __launch_bounds__(Warps* kWarpLanes) moe_sort_kernel(const Id* __restrict__ ids, Route route) {
  await_previous_grid();
  constexpr int kThreads = Warps * kWarpLanes;
  constexpr int kExpertsOfThread = (Experts + kThreads - 1) / kThreads;
  static_assert(kThreads * kItems < 65536, "ranks inside a block are 16 bits wide");
  __shared__ uint16_t rank_of_warp[Warps][Experts];  // first the warp's count, then the ranks before the warp's first
  __shared__ int32_t before[Experts];                // slots of the parts before this block's
  __shared__ int32_t total[Experts];                 // slots of other parts, then of all
  __shared__ int32_t first_tile[Experts];
  __shared__ int32_t tiles_of_warp[Warps], slots_of_warp[Warps];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int32_t part = blockIdx.x * kThreads * kItems;
  const int32_t first = part + warp * kWarpLanes * kItems + lane;

  int32_t expert[kItems], rank[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) expert[i] = local_expert(ids, first + i * kWarpLanes, route);
  for (uint32_t e = threadIdx.x; e < route.experts; e += kThreads) {
    before[e] = total[e] = 0;
#pragma unroll
    for (int w = 0; w < Warps; ++w) rank_of_warp[w][e] = 0;
  }
  __syncthreads();

  const int32_t part_end = part + kThreads * kItems;
  for (int32_t slot = threadIdx.x; slot < part; slot += kThreads) {
    const int32_t e = local_expert(ids, slot, route);
    if (e >= 0) atomicAdd(&before[e], 1);
  }
  for (int32_t slot = part_end + threadIdx.x; slot < route.slots; slot += kThreads) {
    const int32_t e = local_expert(ids, slot, route);
    if (e >= 0) atomicAdd(&total[e], 1);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first - lane + i * kWarpLanes >= route.slots) break;  // the same for the whole warp
    const unsigned peers = __match_any_sync(kFullWarp, expert[i]);
    const int32_t earlier = expert[i] >= 0 ? rank_of_warp[warp][expert[i]] : 0;
    rank[i] = earlier + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (expert[i] >= 0 && lane == __ffs(peers) - 1)
      rank_of_warp[warp][expert[i]] = static_cast<uint16_t>(earlier + __popc(peers));
    __syncwarp();
  }
  __syncthreads();

  int32_t tiles[kExpertsOfThread], own_tiles = 0, own_slots = 0;
#pragma unroll
  for (int i = 0; i < kExpertsOfThread; ++i) {
    const uint32_t e = threadIdx.x * kExpertsOfThread + i;
    tiles[i] = 0;
    if (e >= route.experts) continue;
    int32_t running = 0;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      const int32_t count = rank_of_warp[w][e];
      rank_of_warp[w][e] = static_cast<uint16_t>(running);
      running += count;
    }
    running += before[e] + total[e];
    total[e] = running;
    tiles[i] = (running + route.tile_size - 1) / route.tile_size;
    own_tiles += tiles[i];
    own_slots += running;
  }
  int32_t all_tiles, all_slots;
  int32_t tile = sum_before<Warps>(own_tiles, tiles_of_warp, &all_tiles);
  sum_before<Warps>(own_slots, slots_of_warp, &all_slots);
#pragma unroll
  for (int i = 0; i < kExpertsOfThread; ++i) {
    const uint32_t e = threadIdx.x * kExpertsOfThread + i;
    if (e < route.experts) first_tile[e] = tile;
    tile += tiles[i];
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t slot = first + i * kWarpLanes;
    if (slot >= route.slots) break;
    const int32_t e = expert[i];
    int32_t row = kNone;
    if (e >= 0) {
      row = first_tile[e] * route.tile_size + before[e] + rank_of_warp[warp][e] + rank[i];
      route.row_to_slot[row] = slot;
    }
    route.slot_to_row[slot] = row;
  }
  // The tables of an expert's tiles, and the padding of its last one: a warp an expert, over all blocks.
  for (uint32_t e = blockIdx.x * Warps + warp; e < route.experts; e += gridDim.x * Warps) {
    const int32_t rows = total[e], from = first_tile[e];
    const int32_t count = (rows + route.tile_size - 1) / route.tile_size;
    for (int32_t i = lane; i < count; i += kWarpLanes) {
      route.tile_to_expert[from + i] = e;
      route.tile_rows[from + i] = min(route.tile_size, rows - i * route.tile_size);
    }
    for (int32_t i = rows + lane; i < count * route.tile_size; i += kWarpLanes)
      route.row_to_slot[from * route.tile_size + i] = kNone;
  }
  for (int32_t i = all_tiles + blockIdx.x * kThreads + threadIdx.x; i < route.tiles; i += gridDim.x * kThreads) {
    route.tile_to_expert[i] = kNone;
    route.tile_rows[i] = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    route.counts[0] = all_tiles;
    route.counts[1] = all_slots;
  }
}

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxSlots = int64_t{1} << 30;  // rows with their padding still fit in 31 bits

static bool is_tile_size(int64_t rows) { return rows == 16 || rows == 32 || rows == 64 || rows == 128; }

template <int Experts, int Warps>
static dsv4_status launch_sort(const LaunchTarget& target, const dsv4_tensor& ids, const Route& route) {
  constexpr int kThreads = Warps * kWarpLanes;
  const uint32_t blocks = std::max(1u, blocks_for(route.slots, kThreads * kItems));
  return with_index_type(ids.dtype, [&](auto id) {
    using Id = decltype(id);
    return launch<moe_sort_kernel<Experts, Warps, Id>>(target, {blocks, kThreads}, static_cast<const Id*>(ids.data),
                                                       route);
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
  check.tensor("topk_ids", args.topk_ids, one_of(DSV4_INT32, DSV4_INT64), {kAny, kAny});
  check.range("topk_ids columns (top_k)", top_k, 1, DSV4_MAX_TOP_K);
  check.range("topk_ids elements", tokens * top_k, 0, kMaxSlots);
  check.range("local_experts", args.local_experts, 1, kMaxExperts);
  check.require(is_tile_size(args.tile_size), "tile_size", "16, 32, 64 or 128", args.tile_size);
  check.range("experts_start_idx", args.experts_start_idx, 0, INT32_MAX);
  const int64_t tiles = dsv4_moe_sort_max_tiles(tokens * top_k, args.local_experts, args.tile_size);
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
  route.first_expert = static_cast<uint64_t>(args.experts_start_idx);
  // Counts of every warp and expert must fit in 48 KiB of shared memory.
  return args.local_experts <= 512 ? launch_sort<512, 32>(target, args.topk_ids, route)
                                   : launch_sort<1024, 16>(target, args.topk_ids, route);
}
