#include "cache/compress_flush.cuh"

#include <dsv4/cache.h>

#include <algorithm>

#include "cache/compress_flush_policy.h"
#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "device/cluster.cuh"

namespace dsv4 {

constexpr int kMaxHeadDim = 512;
constexpr int kMaxThreads = kMaxHeadDim / kChannels;

constexpr int kShortRows = 4;  // rows in flight per thread

// The partial sums of the second group of threads; see PooledRows.
struct HandedOver {
  Four<float> top[kMaxThreads];
  Four<float> sum[kMaxThreads];
  Four<float> value[kMaxThreads];
};

// Windows of up to 8 rows (CSA): four channels per thread and one token per block, or several tokens one after another
// for batches of thousands. With Groups = 2, for small grids, which are bound by latency, a second group of threads
// pools every other row, and then stores tokens while the first group finishes the entry.
template <typename T, int Groups>
__global__ void __launch_bounds__(Groups* kMaxThreads, Groups == 1 ? 3 : 1)
    compress_flush_kernel(const __grid_constant__ CompressFlush call) {
  await_previous_grid();
  // In small grids each warp computes the row places itself, which saves a barrier; large grids are bound by
  // instruction issue, so there one warp computes them for the block.
  constexpr bool kEachWarp = Groups > 1;
  __shared__ RowPlace all_places[kEachWarp ? Groups * kMaxThreads / kWarpLanes : 1][kShortWindow];
  __shared__ HandedOver handed_over;
  __shared__ alignas(16) float scratch[kScratch];
  const int group_threads = blockDim.x / Groups;
  const int group = Groups == 1 ? 0 : threadIdx.x / group_threads;
  const int thread = threadIdx.x - group * group_threads, channel = kChannels * thread;
  const int last = min(static_cast<int>(blockIdx.x + 1) * call.tokens_per_task, call.tokens);
  const int finder = kEachWarp ? threadIdx.x % kWarpLanes : threadIdx.x;
  RowPlace* const places = all_places[kEachWarp ? threadIdx.x / kWarpLanes : 0];
  bool first = true;
  for (int token = blockIdx.x * call.tokens_per_task; token < last;) {
    const Request request = find_request(call, token);
    const int end = min(request.end, last);
    if (request.index < 0) {
      token = end;
      continue;
    }
    // `next`: the next token that completes a block; tokens [token, next] are stored with it.
    int next = token + (~request.position(token) & (call.ratio() - 1));
    for (; next < end; next += call.ratio()) {
      const int block = request.position(next) >> call.ratio_bits;
      const int64_t loaded = load_destination(call, request, next, block);
      const Finish finish = load_finish(call, block, channel);
      if (!first) __syncthreads();  // places and sums of the previous entry have been read
      first = false;
      bool complete = true;
      if (finder < kShortWindow) {
        const RowPlace place = find_row<T>(call, request, block, finder);
        complete = !place.is(RowPlace::kMissing);
        places[finder] = place;
      }
      complete = kEachWarp ? __all_sync(kFullWarp, complete) : __syncthreads_and(complete);
      if (kEachWarp) __syncwarp();
      PooledRows pooled;
#pragma unroll 1
      for (int row = group; row < call.window(); row += Groups * kShortRows) {
        const auto rows = load_rows<T, kShortRows>(call, places, row, Groups, channel);
        pooled.add(rows.score, rows.kv);
      }
      store_successors<T>(call, request, block, places, group, Groups, channel);
      if (Groups > 1) {
        if (group > 0) {
          handed_over.top[thread] = reinterpret_cast<const Four<float>&>(pooled.top);
          handed_over.sum[thread] = reinterpret_cast<const Four<float>&>(pooled.sum);
          handed_over.value[thread] = reinterpret_cast<const Four<float>&>(pooled.value);
        }
        __syncthreads();
      }
      if (group == Groups - 1) store_tokens<T>(call, request, token, next + 1, thread, group_threads);
      token = next + 1;
      const Place place = destination(call, loaded, block);
      if (group == 0 && complete && place.exists() && int64_t{block} << call.ratio_bits < call.positions) {
        if (Groups > 1) {
          PooledRows other;
          reinterpret_cast<Four<float>&>(other.top) = handed_over.top[thread];
          reinterpret_cast<Four<float>&>(other.sum) = handed_over.sum[thread];
          reinterpret_cast<Four<float>&>(other.value) = handed_over.value[thread];
          pooled.merge(other);
        }
        float values[kChannels];
#pragma unroll
        for (int i = 0; i < kChannels; ++i) values[i] = pooled.result(i);
        finish_entry(call, place, finish, channel, values, scratch);
      }
    }
    store_tokens<T>(call, request, token, end, threadIdx.x, blockDim.x);
    token = end;
  }
}

// Windows of 128 or 256 rows (HCA): each block of a cluster pools a slice of the channels, and each group of threads in
// a block every kGroups-th row. The first block receives the other blocks' channels through distributed shared memory
// and finishes the entry, while the others go on.
constexpr int kRowsAtOnce = 2;  // rows in flight per group: few, so that several blocks fit on a multiprocessor
constexpr int kSliceThreads = 256;

// Resident blocks per multiprocessor: the launch bounds, and what the host counts on.
#if defined(__CUDA_ARCH__)
constexpr int kLongBlocks = kCompressFlushTuning.of_major(__CUDA_ARCH__ / 100).long_blocks;
#else
constexpr int kLongBlocks = 1;  // the host compilation pass compiles no kernel
#endif
constexpr int kLongestWindow = 256;
static_assert(kLongestWindow <= kSliceThreads, "one thread computes the place of each row");

// The partial sums of a block's groups of threads, per channel; see PooledRows.
template <int Slice>
struct Slices {
  static constexpr int kGroupThreads = Slice / kChannels;
  static constexpr int kGroups = kSliceThreads / kGroupThreads;
  static_assert(128 % (kGroups * kRowsAtOnce) == 0, "windows are of 128 or 256 rows");

  Four<float> top[kGroups][kGroupThreads];
  Four<float> sum[kGroups][kGroupThreads];
  Four<float> value[kGroups][kGroupThreads];

  __device__ float result(int channel) const {
    const int thread = channel / kChannels, i = channel % kChannels;
    float highest = -INFINITY;
#pragma unroll 4
    for (int group = 0; group < kGroups; ++group) highest = fmaxf(highest, top[group][thread].values[i]);
    const float base = PooledRows::finite_base(highest);
    float weights = 0.0f, weighted = 0.0f;
#pragma unroll 4
    for (int group = 0; group < kGroups; ++group) {
      const float scale = exp_of(top[group][thread].values[i] - base);
      weights = fmaf(sum[group][thread].values[i], scale, weights);
      weighted = fmaf(value[group][thread].values[i], scale, weighted);
    }
    return weights == 0.0f ? 0.0f : weighted / weights;
  }
};

template <typename T, int Blocks, int HeadDim>
__global__ void __cluster_dims__(Blocks, 1, 1) __launch_bounds__(kSliceThreads, kLongBlocks)
    compress_flush_long_kernel(const __grid_constant__ CompressFlush call) {
  await_previous_grid();
  constexpr int kSlice = HeadDim / Blocks, kEntryThreads = HeadDim / kChannels;
  constexpr int kGroups = Slices<kSlice>::kGroups, kGroupThreads = Slices<kSlice>::kGroupThreads;
  __shared__ RowPlace places[kLongestWindow];
  __shared__ Slices<kSlice> slices;
  // Used in the first block. Double buffered: the next entry arrives while one is being finished.
  __shared__ alignas(16) float entry[2][HeadDim];
  __shared__ alignas(16) float scratch[kScratch];
  const int thread = threadIdx.x, rank = blockIdx.x % Blocks;
  const int group = thread / kGroupThreads, group_thread = thread % kGroupThreads;
  const int channel = rank * kSlice + kChannels * group_thread;
  // The first block also finishes entries, so the last block takes the first token rows to store.
  const int row_thread = (Blocks - 1 - rank) * kSliceThreads + thread;
  const int task = blockIdx.x / Blocks;
  const int last = min((task + 1) * call.tokens_per_task, call.tokens);
  bool started = false;  // whether the first block is known to run
  int turn = 0;
  __cluster_barrier_arrive_relaxed();
  for (int token = task * call.tokens_per_task; token < last;) {
    const Request request = find_request(call, token);
    const int end = min(request.end, last);
    if (request.index < 0) {
      token = end;
      continue;
    }
    int next = token + (~request.position(token) & (call.ratio() - 1));
    for (; next < end; next += call.ratio()) {
      const int block = request.position(next) >> call.ratio_bits;
      bool complete = true;
      if (thread < call.window()) {
        const RowPlace place = find_row<T>(call, request, block, thread);
        complete = !place.is(RowPlace::kMissing);
        places[thread] = place;
      }
      complete = __syncthreads_and(complete);
      PooledRows pooled;
#pragma unroll 1
      for (int row = group; row < call.window(); row += kGroups * kRowsAtOnce) {
        const auto rows = load_rows<T, kRowsAtOnce>(call, places, row, kGroups, channel);
        pooled.add(rows.score, rows.kv);
      }
      store_successors<T>(call, request, block, places, group, kGroups, channel);
      // Loaded here so that they are in flight during the reduction; earlier they would take registers from the rows.
      Place place = destination(call, load_destination(call, request, next, block), block);
      Finish finish;
      if (thread < kEntryThreads) finish = load_finish(call, block, kChannels * thread);
      slices.top[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.top);
      slices.sum[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.sum);
      slices.value[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.value);
      __syncthreads();
      if (!complete || int64_t{block} << call.ratio_bits >= call.positions) place.page = -1;
      if (!started) __cluster_barrier_wait();
      started = true;
      if (thread < kSlice) store_to_block(&entry[turn % 2][rank * kSlice + thread], slices.result(thread), 0);
      __cluster_barrier_arrive();
      store_tokens<T>(call, request, token, next + 1, row_thread, Blocks * kSliceThreads);
      token = next + 1;
      __cluster_barrier_wait();
      if (rank == 0 && thread < kEntryThreads && place.exists()) {
        float values[kChannels];
        reinterpret_cast<Four<float>&>(values) = reinterpret_cast<const Four<float>*>(entry[turn % 2])[thread];
        finish_entry(call, place, finish, kChannels * thread, values, scratch);
      }
      ++turn;
    }
    store_tokens<T>(call, request, token, end, row_thread, Blocks * kSliceThreads);
    token = end;
  }
  if (!started) __cluster_barrier_wait();
}

template <int Value>
using Constant = std::integral_constant<int, Value>;

template <typename T>
static dsv4_status launch_for(const LaunchTarget& target, CompressFlush& call) {
  const int64_t threads = call.head_dim / kChannels;
  const CompressFlushPolicy policy = compress_flush_policy(
      *target.device,
      {call.tokens, call.tokens_per_request.value, call.window(), call.ratio(), call.head_dim, threads});
  call.tokens_per_task = policy.tokens_per_task;
  if (policy.groups) {
    const Geometry geometry = {policy.tasks, static_cast<uint32_t>(policy.groups * threads)};
    return policy.groups == 2 ? launch<compress_flush_kernel<T, 2>>(target, geometry, call)
                              : launch<compress_flush_kernel<T, 1>>(target, geometry, call);
  }
  const auto launch_long = [&](auto blocks, auto head_dim) {
    constexpr int kBlocks = decltype(blocks)::value;
    return launch<compress_flush_long_kernel<T, kBlocks, decltype(head_dim)::value>>(
        target, {policy.tasks * kBlocks, kSliceThreads}, call);
  };
  if (policy.cluster == 2) return launch_long(Constant<2>(), Constant<128>());
  if (policy.cluster == 8) return launch_long(Constant<8>(), Constant<kMaxHeadDim>());
  return launch_long(Constant<4>(), Constant<kMaxHeadDim>());
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_compress_flush(const dsv4_compress_flush_args* given, dsv4_stream stream) {
  using namespace dsv4;
  constexpr int64_t kVector = sizeof(float4);
  const DtypeSet indices = one_of(DSV4_INT32, DSV4_INT64);
  Check check("compress_flush");
  const dsv4_compress_flush_args args = check.read(given);
  check.range("layout", args.layout, 0, kPageLayoutCount - 1);
  const dsv4_page_layout_info& layout = kPageLayouts[check.status() ? 0 : args.layout];
  const int64_t tokens = extent(args.kv, 0);
  const int64_t requests = extent(args.start_positions, 0);
  const int64_t streams = args.overlap ? 2 : 1;
  const int64_t width = layout.head_dim * streams;
  const DtypeSet rows =
      present(args.kv) && args.kv.dtype == DSV4_BFLOAT16 ? one_of(DSV4_BFLOAT16) : one_of(DSV4_FLOAT32, DSV4_BFLOAT16);
  check.flag("overlap", args.overlap);
  check.require(args.ratio == 1 || args.ratio == 2 || args.ratio == 4 || args.ratio == 128, "ratio", "1, 2, 4 or 128",
                args.ratio);
  check.tensor("kv", args.kv, rows, {kAny, width}, Layout::kStridedRows);
  check.range("kv rows (tokens)", tokens, 0, INT32_MAX / 2);
  const int64_t vector = kChannels * dtype_bytes(args.kv.dtype);
  check.aligned_rows("kv", args.kv, vector);
  if (args.ratio > 1 || args.overlap) check.given("score", args.score, "where a block has more than one row");
  check.optional_tensor("score", args.score, one_of(args.kv.dtype), {tokens, width}, Layout::kStridedRows);
  if (present(args.score)) check.aligned_rows("score", args.score, vector);
  check.optional_tensor("ape", args.ape, one_of(DSV4_FLOAT32), {args.ratio, width});
  check.aligned_rows("ape", args.ape, kVector);
  check.tensor("start_positions", args.start_positions, indices, {kAny});
  check.range("start_positions (requests)", requests, 0, INT32_MAX - 1);
  if (check.status()) return check.status();  // the code below computes with these extents
  check.tensor("query_starts", args.query_starts, indices, {requests + 1});
  check.tensor("state", args.state, one_of(DSV4_FLOAT32), {kAny, kAny, 2, width});
  check.aligned_rows("state", args.state, kVector);
  check.tensor("state_table", args.state_table, one_of(DSV4_INT32), {requests, kAny});
  const int64_t state_rows = extent(args.state, 1), state_columns = extent(args.state_table, 1);
  check.range("state rows", state_rows, 1, INT32_MAX);
  check.range("state_table columns", state_columns, 1, INT32_MAX);
  const int64_t capacity = saturating_product(state_rows, state_columns);
  check.range("state rows x state_table columns (a request's rows)", capacity, args.ratio * streams, INT64_MAX);
  check.tensor("norm_weight", args.norm_weight, one_of(DSV4_FLOAT32, DSV4_BFLOAT16), {layout.head_dim});
  check.aligned_rows("norm_weight", args.norm_weight, kChannels * dtype_bytes(args.norm_weight.dtype));
  check.tensor("cos_sin", args.cos_sin, one_of(DSV4_FLOAT32), {kAny, kRopeDim});
  check.aligned_rows("cos_sin", args.cos_sin, sizeof(float2));
  check_pages(check, args.pages, args.scales, args.rope, layout, args.entries_per_page);
  check.optional_tensor("block_table", args.block_table, one_of(DSV4_INT32), {requests, kAny});
  check.optional_tensor("slot_mapping", args.slot_mapping, indices, {tokens});
  if (present(args.slot_mapping))
    check.absent("block_table", args.block_table, "when slot_mapping is given");
  else
    check.given("block_table", args.block_table, "unless slot_mapping is");
  check.flag("hadamard", args.hadamard);
  if (args.hadamard) check.range("channels of the layout (with hadamard)", layout.head_dim, 128, 128);
  check.flag("round_once", args.round_once);
  check.number("epsilon", args.epsilon, 0.0f);
  check.number("amax_floor", args.amax_floor, 0.0f);
  check.number("scale_floor", args.scale_floor, 0.0f);
  check.flag("fp4_ties_toward_zero", args.fp4_ties_toward_zero);
  check.flag("exact_scale", args.exact_scale);
  check.changes(args.state, args.pages, args.scales, args.rope);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0 || requests == 0) return DSV4_OK;
  CompressFlush call = {};
  call.kv = args.kv.data;
  call.score = args.score.data;
  call.ape = static_cast<const float*>(args.ape.data);
  call.query_starts = indices_of(args.query_starts);
  call.start_positions = indices_of(args.start_positions);
  call.state_table = static_cast<const int32_t*>(args.state_table.data);
  call.state = static_cast<float*>(args.state.data);
  call.norm_weight = args.norm_weight.data;
  call.norm_is_bfloat16 = args.norm_weight.dtype == DSV4_BFLOAT16;
  call.cos_sin = static_cast<const float*>(args.cos_sin.data);
  call.block_table = static_cast<const int32_t*>(args.block_table.data);
  // A table without columns has no address and is never read. The kernel tells by the pointer which one is given.
  if (present(args.block_table) && !call.block_table)
    call.block_table = static_cast<const int32_t*>(call.query_starts.data);
  call.slot_mapping = indices_of(args.slot_mapping);
  call.pages = pages_of(args.pages, args.scales, args.rope, layout, args.entries_per_page);
  call.kv_stride = args.kv.stride[0];
  call.score_stride = args.score.stride[0];
  call.state_pages = extent(args.state, 0);
  call.positions = extent(args.cos_sin, 0);
  call.layout = page_layout(layout);
  call.quantization = {args.amax_floor, args.scale_floor, args.fp4_ties_toward_zero != 0, args.exact_scale != 0};
  call.tokens = static_cast<int32_t>(tokens);
  call.requests = static_cast<int32_t>(requests);
  call.tokens_per_request = Divisor(static_cast<uint32_t>(std::max<int64_t>(tokens / requests, 1)));
  call.head_dim = layout.head_dim;
  call.width = static_cast<int32_t>(width);
  while (kChannels << call.head_bits < call.head_dim) ++call.head_bits;
  while (1 << call.ratio_bits < args.ratio) ++call.ratio_bits;
  call.state_rows = Divisor(static_cast<uint32_t>(state_rows));
  call.state_columns = Divisor(static_cast<uint32_t>(state_columns));
  call.capacity = Divisor(static_cast<uint32_t>(std::min<int64_t>(capacity, INT32_MAX)));
  call.blocks_per_request = static_cast<int32_t>(extent(args.block_table, 1));
  call.epsilon = args.epsilon;
  call.reciprocal_dim = 1.0f / static_cast<float>(layout.head_dim);
  call.overlap = args.overlap != 0;
  call.hadamard = args.hadamard != 0;
  call.round_once = args.round_once != 0;
  return args.kv.dtype == DSV4_BFLOAT16 ? launch_for<__nv_bfloat16>(target, call) : launch_for<float>(target, call);
}
