#include <dsv4/moe.h>

#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "device/scan.cuh"
#include "moe/rank_of_id.cuh"

namespace dsv4 {

constexpr int kThreads = 512;
constexpr int64_t kMaxSlots = int64_t{1} << 30;
constexpr int64_t kMaxRanks = 65535;

struct DispatchPlaces {
  RankTable rank_of_id;
  int64_t* dropped;
  int32_t* slot_to_place;
  int32_t* place_to_slot;
  int32_t tokens, top_k, ranks, capacity;
  bool one_per_rank;
};

// A block for each rank goes through all tokens, a thread for each, and writes what concerns the slots of its rank. The
// first block also writes the slots that go nowhere.
template <typename Id>
__global__ void __launch_bounds__(kThreads)
    moe_dispatch_places_kernel(const Id* __restrict__ ids, DispatchPlaces places) {
  await_previous_grid();
  __shared__ uint32_t warp_sums[kThreads / kWarpLanes];
  const int32_t rank = blockIdx.x, top_k = places.top_k;
  int32_t* const own_places = places.place_to_slot + int64_t{rank} * places.capacity;
  uint32_t before = 0;  // slots of earlier tokens
  for (int32_t first = 0; first < places.tokens; first += kThreads) {
    const int32_t token = first + threadIdx.x;
    uint32_t goes = 0;  // the slots that take a place, a bit each
    if (token < places.tokens) {
      for (int k = 0; k < top_k; ++k) {
        const int32_t slot = token * top_k + k;
        const int32_t of_slot = places.rank_of_id[static_cast<int64_t>(ids[slot])];
        const bool here = of_slot == rank;
        const bool taken = here && !(places.one_per_rank && goes);
        if (taken) goes |= 1u << k;
        const bool nowhere = blockIdx.x == 0 && (of_slot < 0 || of_slot >= places.ranks);
        if ((here && !taken) || nowhere) places.slot_to_place[slot] = -1;
      }
    }
    uint32_t all;
    uint32_t place = before + sum_before<kThreads>(__popc(goes), warp_sums, &all);
    before += all;
    for (; goes; goes &= goes - 1, ++place) {
      const int32_t slot = token * top_k + __ffs(goes) - 1;
      const bool fits = place < static_cast<uint32_t>(places.capacity);
      places.slot_to_place[slot] = fits ? rank * places.capacity + static_cast<int32_t>(place) : -1;
      if (fits) own_places[place] = slot;
    }
  }
  for (uint32_t place = before + threadIdx.x; place < static_cast<uint32_t>(places.capacity); place += kThreads)
    own_places[place] = -1;
  if (threadIdx.x == 0 && before > static_cast<uint32_t>(places.capacity))
    atomicAdd(reinterpret_cast<unsigned long long*>(places.dropped),
              static_cast<unsigned long long>(before - places.capacity));
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_dispatch_places(const dsv4_moe_dispatch_places_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_dispatch_places");
  const dsv4_moe_dispatch_places_args args = check.read(given);
  const int64_t tokens = extent(args.topk_ids, 0);
  const int64_t top_k = extent(args.topk_ids, 1);
  check.tensor("topk_ids", args.topk_ids, one_of(DSV4_INT32, DSV4_INT64), {kAny, kAny});
  check.range("topk_ids columns (top_k)", top_k, 1, DSV4_MAX_TOP_K);
  check.range("topk_ids elements", saturating_product(tokens, top_k), 0, kMaxSlots);
  check.tensor("rank_of_id", args.rank_of_id, one_of(DSV4_INT32), {kAny});
  check.tensor("dropped", args.dropped, one_of(DSV4_INT64), {1});
  check.range("ranks", args.ranks, 1, kMaxRanks);
  check.range("capacity", args.capacity, 1, kMaxSlots);
  check.range("ranks times capacity", saturating_product(args.ranks, args.capacity), 1, kMaxSlots);
  check.flag("one_per_rank", args.one_per_rank);
  check.tensor("out_slot_to_place", args.out_slot_to_place, one_of(DSV4_INT32), {tokens, top_k});
  check.tensor("out_place_to_slot", args.out_place_to_slot, one_of(DSV4_INT32),
               {saturating_product(args.ranks, args.capacity)});
  check.changes(args.dropped);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  DispatchPlaces places = {};
  places.rank_of_id = {static_cast<const int32_t*>(args.rank_of_id.data), extent(args.rank_of_id, 0)};
  places.dropped = static_cast<int64_t*>(args.dropped.data);
  places.slot_to_place = static_cast<int32_t*>(args.out_slot_to_place.data);
  places.place_to_slot = static_cast<int32_t*>(args.out_place_to_slot.data);
  places.tokens = static_cast<int32_t>(tokens);
  places.top_k = static_cast<int32_t>(top_k);
  places.ranks = args.ranks;
  places.capacity = args.capacity;
  places.one_per_rank = args.one_per_rank != 0;
  return with_index_type(args.topk_ids.dtype, [&](auto id) {
    using Id = decltype(id);
    return launch<moe_dispatch_places_kernel<Id>>(target, {static_cast<uint32_t>(args.ranks), kThreads},
                                                  static_cast<const Id*>(args.topk_ids.data), places);
  });
}
