#include "core/launch.h"
#include "stash/stash_policy.h"

namespace dsv4 {

struct StashPop {
  const char* pools[2];  // CUDA, host
  int64_t* free_lists[2];
  int64_t pool_pages[2];
  char* target;
  const int64_t* num_tokens;
  const int64_t* page_record;
  const int64_t* spilled_to_host;
  const int64_t* overflow;
  const int64_t* tail;
  const int64_t* capacity;
  int64_t* new_tail;
  StashCounters* counters;
  int64_t rows;
  int64_t row_bytes;
  int64_t page_size;
  bool zero_rest;
};

// What becomes of a call. Every block works it out alike.
struct PopPlan {
  int64_t cuda_tail, host_tail;
  int64_t needed;  // pages
  int64_t bytes;   // of all rows
  bool moves, from_host;
  const char* pool;
  int64_t* free_list;
  int64_t pool_pages, capacity, tail;

  __device__ explicit PopPlan(const StashPop& stash) {
    cuda_tail = stash.tail[0], host_tail = stash.tail[1];
    const int64_t cuda_capacity = stash.capacity[0], host_capacity = stash.capacity[1];
    const bool overflowed = *stash.overflow != 0;
    from_host = *stash.spilled_to_host != 0;
    const int64_t tokens = tokens_of(stash.num_tokens, stash.rows);
    needed = (tokens + stash.page_size - 1) / stash.page_size;
    bytes = tokens * stash.row_bytes;
    pool = stash.pools[from_host];
    free_list = stash.free_lists[from_host];
    pool_pages = stash.pool_pages[from_host];
    capacity = from_host ? host_capacity : cuda_capacity;
    tail = from_host ? host_tail : cuda_tail;
    // Without tokens the list is not looked at, so it need not be sound.
    moves = !overflowed && (needed == 0 || (capacity >= needed && capacity <= pool_pages && tail >= 0));
  }

  __device__ void give_back(uint32_t page, int64_t id) const {
    const int64_t slot = tail % capacity + page;
    free_list[slot < capacity ? slot : slot - capacity] = id;
  }

  __device__ bool in_pool(int64_t id) const { return id >= 0 && id < pool_pages; }

  // By the last block to have read the metadata, so they may be updated in place.
  __device__ void finish(const StashPop& stash) const {
    stash.new_tail[0] = cuda_tail + (moves && !from_host ? needed : 0);
    stash.new_tail[1] = host_tail + (moves && from_host ? needed : 0);
  }
};

// The rows behind the last token, which are contiguous, by `threads` threads of each block.
__device__ inline void zero_rest(const StashPop& stash, const PopPlan& plan, int thread, int threads) {
  if (!plan.moves || !stash.zero_rest) return;
  zero_bytes(stash.target + plan.bytes, stash.target + stash.rows * stash.row_bytes,
             int64_t{blockIdx.x} * threads + thread, int64_t{gridDim.x} * threads);
}

template <typename Word>
__global__ void __launch_bounds__(kUnitThreads) paged_stash_pop_units(StashPop stash) {
  await_previous_grid();
  const int64_t page_bytes = stash.page_size * stash.row_bytes;
  const int lane = threadIdx.x % kWarpLanes;
  UnitWalk<Word> at(page_bytes);
  // The record has an entry for every page of the rows, so this need not wait for the count.
  int64_t next = at.page * stash.page_size < stash.rows ? stash.page_record[at.page] : 0;
  const PopPlan plan(stash);
  const bool last = arrives_last(&stash.counters->arrivals);
  if (plan.moves) {
    while (at.page < plan.needed) {
      const UnitWalk<Word> here = at;
      const int64_t id = next;
      at.advance();
      if (at.page < plan.needed) next = stash.page_record[at.page];  // on its way while the rows are
      if (here.unit == 0 && lane == 0) plan.give_back(here.page, id);
      if (!plan.in_pool(id)) continue;
      const int64_t size = here.size(page_bytes, plan.bytes);
      UnitInFlight<Word> bytes;
      bytes.load(plan.pool + id * page_bytes + here.offset(), size, lane);
      bytes.store(stash.target + here.page * page_bytes + here.offset(), size, lane);
    }
  }
  zero_rest(stash, plan, threadIdx.x, kUnitThreads);
  if (last) plan.finish(stash);
}

__global__ void __launch_bounds__(kRingThreads, kRingBlocks) paged_stash_pop_bulk(StashPop stash) {
  await_previous_grid();
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t full[kStages];
  __shared__ Span in_flight[kStages];
  const PopPlan plan(stash);
  const bool last = arrives_last(&stash.counters->arrivals);
  if (threadIdx.x == 0 && plan.moves) {
    const Spans spans(plan.needed, stash.page_size * stash.row_bytes, plan.bytes);
    move_spans(spans, &stash.counters->drawn, stages, full, in_flight, [&](uint32_t span) {
      return stash.page_record[spans.page(span)];
    }, [&](uint32_t span, int64_t id) -> Span {
      const uint32_t page = spans.page(span);
      const int64_t offset = spans.offset(span);
      if (spans.starts_page(span)) plan.give_back(page, id);
      return {plan.pool + id * spans.page_bytes + offset, stash.target + page * spans.page_bytes + offset,
              plan.in_pool(id) ? spans.size(span) : 0};
    });
  }
  if (threadIdx.x >= kWarpLanes) zero_rest(stash, plan, threadIdx.x - kWarpLanes, kRingThreads - kWarpLanes);
  if (last) plan.finish(stash);
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_paged_stash_pop(const dsv4_paged_stash_pop_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("paged_stash_pop");
  const dsv4_paged_stash_pop_args args = check.read(given);
  const StashShape shape = check_pools(check, "dst", args.dst, "cuda_src", args.cuda_src, "host_src", args.host_src,
                                       args.free_list_cuda, args.free_list_host, args.page_record);
  check_one(check, "num_tokens", args.num_tokens);
  check_one(check, "spilled_to_host", args.spilled_to_host);
  check_one(check, "overflow", args.overflow);
  check.tensor("free_list_tail", args.free_list_tail, one_of(DSV4_INT64), {2});
  check.tensor("free_list_capacity", args.free_list_capacity, one_of(DSV4_INT64), {2});
  check.optional_tensor("new_free_list_tail", args.new_free_list_tail, one_of(DSV4_INT64), {2});
  check.flag("zero_rest", args.zero_rest);
  check_workspace(check, args.workspace);
  check.changes(args.dst, args.free_list_cuda, args.free_list_host);
  check_advanced(check, args.free_list_tail, args.new_free_list_tail);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;
  if (dsv4_status status = check.reachable("host_src", args.host_src)) return status;

  void* const new_tail = present(args.new_free_list_tail) ? args.new_free_list_tail.data : args.free_list_tail.data;
  const auto numbers = [](const dsv4_tensor& tensor) { return static_cast<int64_t*>(tensor.data); };
  StashPop stash = {};
  stash.pools[0] = static_cast<const char*>(args.cuda_src.data);
  stash.pools[1] = static_cast<const char*>(args.host_src.data);
  stash.free_lists[0] = numbers(args.free_list_cuda);
  stash.free_lists[1] = numbers(args.free_list_host);
  stash.pool_pages[0] = shape.cuda_pages;
  stash.pool_pages[1] = shape.host_pages;
  stash.target = static_cast<char*>(args.dst.data);
  stash.num_tokens = numbers(args.num_tokens);
  stash.page_record = numbers(args.page_record);
  stash.spilled_to_host = numbers(args.spilled_to_host);
  stash.overflow = numbers(args.overflow);
  stash.tail = numbers(args.free_list_tail);
  stash.capacity = numbers(args.free_list_capacity);
  stash.new_tail = static_cast<int64_t*>(new_tail);
  stash.counters = static_cast<StashCounters*>(args.workspace.data);
  stash.rows = shape.rows;
  stash.row_bytes = shape.row_bytes;
  stash.page_size = shape.page_size;
  stash.zero_rest = args.zero_rest != 0;
  const bool vectors = vectors_fit(shape, {&args.dst, &args.cuda_src, &args.host_src});
  const StashPolicy policy = stash_policy(*target.device, shape, vectors);
  if (policy.bulk) return launch<paged_stash_pop_bulk>(target, {policy.blocks, kRingThreads, kRingBytes}, stash);
  return with_unit_word(vectors, shape, [&](auto word) {
    return launch<paged_stash_pop_units<decltype(word)>>(target, {policy.blocks, kUnitThreads}, stash);
  });
}
