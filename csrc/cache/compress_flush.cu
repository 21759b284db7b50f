#include "cache/compress_flush.cuh"

#include <dsv4/cache.h>

#include <algorithm>

#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "device/cluster.cuh"

namespace dsv4 {

constexpr int kMaxHeadDim = 512;
constexpr int kMaxThreads = kMaxHeadDim / kChannels;

constexpr int kShortWindow = 8;
constexpr int kShortRows = 4;  // that a thread has in flight: more take more code, which costs more than a second turn

// Windows of up to 8 rows: a thread has four channels of all of them, and a block is one token, or a few in turn where
// there are thousands.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 3) compress_flush_kernel(const __grid_constant__ CompressFlush call) {
  await_previous_grid();
  __shared__ RowPlace places[kShortWindow];
  __shared__ alignas(16) float scratch[kScratch];
  const int thread = threadIdx.x, channel = kChannels * thread;
  const int last = min(static_cast<int>(blockIdx.x + 1) * call.tokens_a_task, call.tokens);
  for (int token = blockIdx.x * call.tokens_a_task; token < last;) {
    const Request request = find_request(call, token);
    const int end = min(request.end, last);
    if (request.index < 0) {
      token = end;
      continue;
    }
    // The next token that completes a block, and those before it that wait for being stored.
    int next = token + (~request.position(token) & (call.ratio() - 1));
    for (; next < end; next += call.ratio()) {
      const int block = request.position(next) >> call.ratio_bits;
      const Place place = destination(call, request, next, block);
      const Finish finish = load_finish(call, block, channel);
      bool complete = true;
      if (thread < kShortWindow) {
        places[thread] = find_row<T>(call, request, block, thread);
        complete = places[thread].kind != RowPlace::kMissing;
      }
      complete = __syncthreads_and(complete);
      PooledRows pooled;
#pragma unroll 1
      for (int row = 0; row < call.window(); row += kShortRows) {
        const auto rows = load_rows<T, kShortRows>(places, row, 1, channel);
        pooled.add(rows.score, rows.kv);
      }
      store_tokens<T>(call, request, token, next + 1, thread, blockDim.x);
      store_successors<T>(call, request, block, places, 0, 1, channel);
      token = next + 1;
      if (complete && place.exists() && int64_t{block} << call.ratio_bits < call.positions) {
        float values[kChannels];
#pragma unroll
        for (int i = 0; i < kChannels; ++i) values[i] = pooled.result(i);
        finish_entry(call, place, finish, channel, values, scratch);
      }
      __syncthreads();  // before the next token's rows and sums
    }
    store_tokens<T>(call, request, token, end, thread, blockDim.x);
    token = end;
  }
}

// Windows of many rows: the blocks of a cluster take 64 channels each, a block's 16 groups of threads every sixteenth
// row. The first block gets the others' channels and finishes the entry, while they go on.
constexpr int kSlice = 64;
constexpr int kGroups = 16;
constexpr int kRowsAtOnce = 2;  // of a group: few, so that blocks share a multiprocessor and overlap
constexpr int kGroupThreads = kSlice / kChannels;
constexpr int kSliceThreads = kGroups * kGroupThreads;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLongBlocks = 2;  // of a multiprocessor: three would spill
#else
constexpr int kLongBlocks = 3;
#endif
constexpr int kLongestWindow = 256;
static_assert(kLongestWindow <= kSliceThreads, "a thread finds a row");
static_assert(128 % (kGroups * kRowsAtOnce) == 0, "windows are of 128 or 256 rows");

// What the groups of a block have of each channel; see PooledRows.
struct Slices {
  Four<float> top[kGroups][kGroupThreads];
  Four<float> sum[kGroups][kGroupThreads];
  Four<float> value[kGroups][kGroupThreads];
};

__device__ float result_of_slices(const Slices& slices, int channel) {
  const int thread = channel / kChannels, i = channel % kChannels;
  float top = -INFINITY;
#pragma unroll 4
  for (int group = 0; group < kGroups; ++group) top = fmaxf(top, slices.top[group][thread].values[i]);
  const float base = PooledRows::finite_base(top);
  float sum = 0.0f, value = 0.0f;
#pragma unroll 4
  for (int group = 0; group < kGroups; ++group) {
    const float scale = exp_of(slices.top[group][thread].values[i] - base);
    sum = fmaf(slices.sum[group][thread].values[i], scale, sum);
    value = fmaf(slices.value[group][thread].values[i], scale, value);
  }
  return sum == 0.0f ? 0.0f : value / sum;
}

template <typename T, int Blocks>
__global__ void __cluster_dims__(Blocks, 1, 1) __launch_bounds__(kSliceThreads, kLongBlocks)
    compress_flush_long_kernel(const __grid_constant__ CompressFlush call) {
  await_previous_grid();
  __shared__ RowPlace places[kLongestWindow];
  __shared__ Slices slices;
  // Of the first block; the next entry comes while one is finished.
  __shared__ alignas(16) float entry[2][Blocks * kSlice];
  __shared__ alignas(16) float scratch[kScratch];
  const int thread = threadIdx.x, rank = blockIdx.x % Blocks;
  const int group = thread / kGroupThreads, group_thread = thread % kGroupThreads;
  const int channel = rank * kSlice + kChannels * group_thread;
  // The first block has the most to do: the last one begins with the rows of tokens.
  const int row_thread = (Blocks - 1 - rank) * kSliceThreads + thread;
  const int task = blockIdx.x / Blocks;
  const int last = min((task + 1) * call.tokens_a_task, call.tokens);
  bool started = false;  // whether the first block is known to run
  int turn = 0;
  __cluster_barrier_arrive_relaxed();
  for (int token = task * call.tokens_a_task; token < last;) {
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
        places[thread] = find_row<T>(call, request, block, thread);
        complete = places[thread].kind != RowPlace::kMissing;
      }
      complete = __syncthreads_and(complete);
      PooledRows pooled;
#pragma unroll 1
      for (int row = group; row < call.window(); row += kGroups * kRowsAtOnce) {
        const auto rows = load_rows<T, kRowsAtOnce>(places, row, kGroups, channel);
        pooled.add(rows.score, rows.kv);
      }
      store_successors<T>(call, request, block, places, group, kGroups, channel);
      // On their way while the sums meet; before, their registers are wanted for rows.
      Place place = destination(call, request, next, block);
      const Finish finish = load_finish(call, block, kChannels * thread);
      slices.top[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.top);
      slices.sum[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.sum);
      slices.value[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.value);
      __syncthreads();
      if (!complete || int64_t{block} << call.ratio_bits >= call.positions) place.page = -1;
      if (!started) __cluster_barrier_wait();
      started = true;
      if (thread < kSlice)
        store_to_block(&entry[turn % 2][rank * kSlice + thread], result_of_slices(slices, thread), 0);
      __cluster_barrier_arrive();
      store_tokens<T>(call, request, token, next + 1, row_thread, Blocks * kSliceThreads);
      token = next + 1;
      __cluster_barrier_wait();
      if (rank == 0 && place.exists()) {
        float values[kChannels] = {};
        if (thread < Blocks * kSlice / kChannels)
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

constexpr int64_t kShortBlocks = 16;  // of a multiprocessor: enough to choose from

template <typename T>
static dsv4_status launch_for(const LaunchTarget& target, CompressFlush& call) {
  if (call.window() <= kShortWindow) {
    const int64_t most = target.device->multiprocessors * kShortBlocks;
    call.tokens_a_task = static_cast<int32_t>(blocks_for(call.tokens, most));
    const uint32_t threads = call.head_dim / kChannels;
    return launch<compress_flush_kernel<T>>(target, {blocks_for(call.tokens, call.tokens_a_task), threads}, call);
  }
  const auto launch_long = [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    // A request's tokens, as far as one block of them: then no two entries of a request wait for each other.
    call.tokens_a_task = std::min(static_cast<int32_t>(call.tokens_a_request.value), call.ratio());
    const uint32_t clusters = blocks_for(call.tokens, call.tokens_a_task);
    return launch<compress_flush_long_kernel<T, kBlocks>>(target, {clusters * kBlocks, kSliceThreads}, call);
  };
  if (call.head_dim == kMaxHeadDim) return launch_long(std::integral_constant<int, kMaxHeadDim / kSlice>{});
  return launch_long(std::integral_constant<int, 2>{});
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
  check.require(present(args.score) || (args.ratio == 1 && !args.overlap), "score",
                "a tensor, as blocks have more than one row; rows", args.ratio * streams);
  check.optional_tensor("score", args.score, one_of(args.kv.dtype), {tokens, width}, Layout::kStridedRows);
  if (present(args.score)) check.aligned_rows("score", args.score, vector);
  check.optional_tensor("ape", args.ape, one_of(DSV4_FLOAT32), {args.ratio, width});
  check.aligned_rows("ape", args.ape, kVector);
  check.tensor("start_positions", args.start_positions, indices, {kAny});
  check.range("start_positions (requests)", requests, 0, INT32_MAX - 1);
  check.tensor("query_starts", args.query_starts, one_of(DSV4_INT32), {requests + 1});
  check.tensor("state", args.state, one_of(DSV4_FLOAT32), {kAny, kAny, 2, width});
  check.aligned_rows("state", args.state, kVector);
  check.tensor("state_table", args.state_table, one_of(DSV4_INT32), {requests, kAny});
  const int64_t state_rows = extent(args.state, 1), state_columns = extent(args.state_table, 1);
  check.range("state rows", state_rows, 1, INT32_MAX);
  check.range("state_table columns", state_columns, 1, INT32_MAX);
  check.range("state rows x state_table columns (a request's rows)", state_rows * state_columns, args.ratio * streams,
              INT64_MAX);
  check.tensor("norm_weight", args.norm_weight, one_of(DSV4_FLOAT32), {layout.head_dim});
  check.aligned_rows("norm_weight", args.norm_weight, kVector);
  check.tensor("cos_sin", args.cos_sin, one_of(DSV4_FLOAT32), {kAny, kRopeDim});
  check.aligned_rows("cos_sin", args.cos_sin, sizeof(float2));
  check_pages(check, args.pages, args.scales, args.rope, layout, args.entries_per_page);
  check.optional_tensor("block_table", args.block_table, one_of(DSV4_INT32), {requests, kAny});
  check.optional_tensor("slot_mapping", args.slot_mapping, indices, {tokens});
  check.require(present(args.block_table) != present(args.slot_mapping), "block_table",
                "one of block_table and slot_mapping; given", present(args.block_table) + present(args.slot_mapping));
  check.flag("hadamard", args.hadamard);
  check.require(!args.hadamard || layout.head_dim == 128, "hadamard", "a layout of 128 channels for it",
                layout.head_dim);
  check.flag("round_once", args.round_once);
  check.flag("fp4_ties_toward_zero", args.fp4_ties_toward_zero);
  check.flag("exact_scale", args.exact_scale);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0 || requests == 0) return DSV4_OK;
  CompressFlush call = {};
  call.kv = args.kv.data;
  call.score = args.score.data;
  call.ape = static_cast<const float*>(args.ape.data);
  call.query_starts = static_cast<const int32_t*>(args.query_starts.data);
  call.start_positions = indices_of(args.start_positions);
  call.state_table = static_cast<const int32_t*>(args.state_table.data);
  call.state = static_cast<float*>(args.state.data);
  call.norm_weight = static_cast<const float*>(args.norm_weight.data);
  call.cos_sin = static_cast<const float*>(args.cos_sin.data);
  call.block_table = static_cast<const int32_t*>(args.block_table.data);
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
  call.tokens_a_request = Divisor(static_cast<uint32_t>(std::max<int64_t>(tokens / requests, 1)));
  call.head_dim = layout.head_dim;
  call.width = static_cast<int32_t>(width);
  while (kChannels << call.head_bits < call.head_dim) ++call.head_bits;
  while (1 << call.ratio_bits < args.ratio) ++call.ratio_bits;
  call.state_rows = Divisor(static_cast<uint32_t>(state_rows));
  call.state_columns = Divisor(static_cast<uint32_t>(state_columns));
  call.capacity = Divisor(static_cast<uint32_t>(std::min<int64_t>(state_rows * state_columns, INT32_MAX)));
  call.blocks_a_request = static_cast<int32_t>(extent(args.block_table, 1));
  call.epsilon = args.epsilon;
  call.reciprocal_dim = 1.0f / static_cast<float>(layout.head_dim);
  call.overlap = args.overlap != 0;
  call.hadamard = args.hadamard != 0;
  call.round_once = args.round_once != 0;
  return args.kv.dtype == DSV4_BFLOAT16 ? launch_for<__nv_bfloat16>(target, call) : launch_for<float>(target, call);
}
