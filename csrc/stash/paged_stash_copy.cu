#include "core/launch.h"
#include "stash/stash_policy.h"

namespace dsv4 {

struct StashCopy {
  const char* source;
  char* pools[2];  // CUDA, host
  const int64_t* free_lists[2];
  int64_t pool_pages[2];
  const int64_t* num_tokens;
  const int64_t* head;
  const int64_t* tail;
  const int64_t* capacity;
  int64_t* page_record;
  int64_t* overflow;
  int64_t* host_spill;
  int64_t* spilled_to_host;
  int64_t* new_head;
  int64_t* high_water;  // may be null
  StashCounters* counters;
  int64_t rows;
  int64_t row_bytes;
  int64_t page_size;
};

// Pages that can be taken: none from a list whose numbers contradict each other.
__device__ inline int64_t free_pages(int64_t head, int64_t tail, int64_t capacity, int64_t pages) {
  const bool sound = capacity >= 1 && capacity <= pages && head >= 0 && tail >= head && tail - head <= capacity;
  return sound ? tail - head : 0;
}

// What becomes of a call. Every block works it out alike.
struct CopyPlan {
  int64_t cuda_head, host_head;
  int64_t needed;  // pages
  int64_t bytes;   // of all rows
  bool idle, to_cuda, to_host;
  char* pool;
  const int64_t* free_list;
  int64_t pool_pages, capacity, head, tail;  // of the pool that is chosen

  __device__ explicit CopyPlan(const StashCopy& stash) {
    cuda_head = stash.head[0], host_head = stash.head[1];
    const int64_t cuda_tail = stash.tail[0], host_tail = stash.tail[1];
    const int64_t cuda_capacity = stash.capacity[0], host_capacity = stash.capacity[1];
    const bool overflowed = *stash.overflow != 0;
    const int64_t tokens = tokens_of(stash.num_tokens, stash.rows);
    needed = (tokens + stash.page_size - 1) / stash.page_size;
    bytes = tokens * stash.row_bytes;
    idle = overflowed || needed == 0;
    to_cuda = needed <= free_pages(cuda_head, cuda_tail, cuda_capacity, stash.pool_pages[0]);
    to_host = !to_cuda && needed <= free_pages(host_head, host_tail, host_capacity, stash.pool_pages[1]);
    pool = stash.pools[to_host];
    free_list = stash.free_lists[to_host];
    pool_pages = stash.pool_pages[to_host];
    capacity = to_host ? host_capacity : cuda_capacity;
    head = to_host ? host_head : cuda_head;
    tail = to_host ? host_tail : cuda_tail;
  }

  __device__ bool moves() const { return !idle && (to_cuda || to_host); }

  // Where in the list the first page is. A division of 64 bits: to be done once, while loads are on their way.
  __device__ int64_t first_slot() const { return head % capacity; }

  __device__ int64_t page_id(int64_t first, uint32_t page) const {
    const int64_t slot = first + page;
    return free_list[slot < capacity ? slot : slot - capacity];
  }

  __device__ bool in_pool(int64_t id) const { return id >= 0 && id < pool_pages; }

  // By the last block to have read the metadata, so they may be updated in place.
  __device__ void finish(const StashCopy& stash) const {
    stash.new_head[0] = cuda_head + (!idle && to_cuda ? needed : 0);
    stash.new_head[1] = host_head + (!idle && to_host ? needed : 0);
    if (idle) return;
    *stash.spilled_to_host = !to_cuda;
    if (to_host) *stash.host_spill = 1;
    if (!to_cuda && !to_host) *stash.overflow = 1;
    if (!stash.high_water || !moves()) return;
    const int64_t used = capacity - (tail - head) + needed;
    if (used > stash.high_water[to_host]) stash.high_water[to_host] = used;
  }
};

template <typename Word>
__global__ void __launch_bounds__(kUnitThreads) paged_stash_copy_units(StashCopy stash) {
  await_previous_grid();
  const CopyPlan plan(stash);
  const bool last = arrives_last(&stash.counters->arrivals);
  if (plan.moves()) {
    const int64_t page_bytes = stash.page_size * stash.row_bytes;
    const int64_t first = plan.first_slot();
    const int lane = threadIdx.x % kWarpLanes;
    for (UnitWalk<Word> at(page_bytes); at.page < plan.needed; at.advance()) {
      const int64_t size = at.size(page_bytes, plan.bytes);
      UnitInFlight<Word> bytes;
      bytes.load(stash.source + at.page * page_bytes + at.offset(), size, lane);
      const int64_t id = plan.page_id(first, at.page);
      if (at.unit == 0 && lane == 0) stash.page_record[at.page] = id;
      if (plan.in_pool(id)) bytes.store(plan.pool + id * page_bytes + at.offset(), size, lane);
    }
  }
  if (last) plan.finish(stash);
}

__global__ void __launch_bounds__(kRingThreads, kRingBlocks) paged_stash_copy_bulk(StashCopy stash) {
  await_previous_grid();
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t full[kStages];
  __shared__ Span in_flight[kStages];
  const CopyPlan plan(stash);
  const bool last = arrives_last(&stash.counters->arrivals);
  if (threadIdx.x == 0 && plan.moves()) {
    const Spans spans(plan.needed, stash.page_size * stash.row_bytes, plan.bytes);
    const int64_t first = plan.first_slot();
    move_spans(spans, &stash.counters->drawn, stages, full, in_flight, [&](uint32_t span) {
      return plan.page_id(first, spans.page(span));
    }, [&](uint32_t span, int64_t id) -> Span {
      const uint32_t page = spans.page(span);
      const int64_t offset = spans.offset(span);
      if (spans.starts_page(span)) stash.page_record[page] = id;
      return {stash.source + page * spans.page_bytes + offset, plan.pool + id * spans.page_bytes + offset,
              plan.in_pool(id) ? spans.size(span) : 0};
    });
  }
  if (last) plan.finish(stash);
}

}  // namespace dsv4

extern "C" size_t dsv4_paged_stash_workspace_size(void) { return dsv4::kCounterBytes; }

extern "C" dsv4_status dsv4_paged_stash_copy(const dsv4_paged_stash_copy_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("paged_stash_copy");
  const dsv4_paged_stash_copy_args args = check.read(given);
  const StashShape shape = check_pools(check, "src", args.src, "cuda_dst", args.cuda_dst, "host_dst", args.host_dst,
                                       args.free_list_cuda, args.free_list_host, args.page_record);
  check_one(check, "num_tokens", args.num_tokens);
  check.tensor("free_list_head", args.free_list_head, one_of(DSV4_INT64), {2});
  check.tensor("free_list_tail", args.free_list_tail, one_of(DSV4_INT64), {2});
  check.tensor("free_list_capacity", args.free_list_capacity, one_of(DSV4_INT64), {2});
  check_one(check, "overflow", args.overflow);
  check_one(check, "host_spill_global", args.host_spill_global);
  check_one(check, "spilled_to_host", args.spilled_to_host);
  check.optional_tensor("new_free_list_head", args.new_free_list_head, one_of(DSV4_INT64), {2});
  check.optional_tensor("high_water", args.high_water, one_of(DSV4_INT64), {2});
  check_workspace(check, args.workspace);
  check.changes(args.cuda_dst, args.host_dst, args.page_record, args.overflow, args.host_spill_global,
                args.spilled_to_host, args.high_water);
  check_advanced(check, args.free_list_head, args.new_free_list_head);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;
  if (dsv4_status status = check.reachable("host_dst", args.host_dst)) return status;

  void* const new_head = present(args.new_free_list_head) ? args.new_free_list_head.data : args.free_list_head.data;
  const auto numbers = [](const dsv4_tensor& tensor) { return static_cast<int64_t*>(tensor.data); };
  StashCopy stash = {};
  stash.source = static_cast<const char*>(args.src.data);
  stash.pools[0] = static_cast<char*>(args.cuda_dst.data);
  stash.pools[1] = static_cast<char*>(args.host_dst.data);
  stash.free_lists[0] = numbers(args.free_list_cuda);
  stash.free_lists[1] = numbers(args.free_list_host);
  stash.pool_pages[0] = shape.cuda_pages;
  stash.pool_pages[1] = shape.host_pages;
  stash.num_tokens = numbers(args.num_tokens);
  stash.head = numbers(args.free_list_head);
  stash.tail = numbers(args.free_list_tail);
  stash.capacity = numbers(args.free_list_capacity);
  stash.page_record = numbers(args.page_record);
  stash.overflow = numbers(args.overflow);
  stash.host_spill = numbers(args.host_spill_global);
  stash.spilled_to_host = numbers(args.spilled_to_host);
  stash.new_head = static_cast<int64_t*>(new_head);
  stash.high_water = numbers(args.high_water);
  stash.counters = static_cast<StashCounters*>(args.workspace.data);
  stash.rows = shape.rows;
  stash.row_bytes = shape.row_bytes;
  stash.page_size = shape.page_size;
  const bool vectors = vectors_fit(shape, {&args.src, &args.cuda_dst, &args.host_dst});
  const StashPolicy policy = stash_policy(*target.device, shape, vectors);
  if (policy.bulk) return launch<paged_stash_copy_bulk>(target, {policy.blocks, kRingThreads, kRingBytes}, stash);
  return with_unit_word(vectors, shape, [&](auto word) {
    return launch<paged_stash_copy_units<decltype(word)>>(target, {policy.blocks, kUnitThreads}, stash);
  });
}
