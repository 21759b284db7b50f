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

// Windows of up to kRows rows: a thread has all rows of its four channels in flight, and a block is one token, or a few
// in turn where there are thousands.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 4) compress_flush_kernel(const __grid_constant__ CompressFlush call) {
  await_previous_grid();
  __shared__ float scratch[kMaxThreads / kWarpLanes];
  const int channel = kChannels * threadIdx.x;
  const int first = blockIdx.x * call.tokens_a_task;
  const int last = min(first + call.tokens_a_task, call.tokens);
  Request request = {-1, -1, -1, 0, -1};
  for (int token = first; token < last; ++token) {
    if (!request.holds(token)) request = find_request(call, token);
    if (request.index < 0) continue;
    const uint32_t position = static_cast<uint32_t>(request.position(token));
    if ((position + 1) % call.ratio != 0) {
      store_token<T>(call, request, token, threadIdx.x, blockDim.x);
      continue;
    }
    const int block = position / call.ratio;
    int64_t index = destination(call, request, token, block);
    const Finish finish = load_finish(call, block, channel);
    const Rows rows = load_rows<T>(call, request, block, 0, 1, channel);
    store_token<T>(call, request, token, threadIdx.x, blockDim.x);
    store_successors<T>(call, request, rows);
    PooledRows pooled;
    pooled.add(rows.score, rows.kv);
    if (!rows.complete || !call.pages.holds(index) || block * call.ratio >= call.positions) continue;
    float values[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = pooled.result(i);
    finish_entry(call, index, finish, channel, values, scratch);
    __syncthreads();  // before the next token's sums
  }
}

// Windows of many rows: the blocks of a cluster take 64 channels each, a block's 16 groups of threads every sixteenth
// row. The first block gets the others' channels and finishes the entry, while they go on.
constexpr int kSlice = 64;
constexpr int kGroups = 16;
constexpr int kGroupThreads = kSlice / kChannels;
constexpr int kSliceThreads = kGroups * kGroupThreads;

// What the groups of a block have of each channel; see PooledRows.
struct Slices {
  Four<float> top[kGroups][kGroupThreads];
  Four<float> sum[kGroups][kGroupThreads];
  Four<float> value[kGroups][kGroupThreads];
};

__device__ float result_of_slices(const Slices& slices, int channel) {
  const int thread = channel / kChannels, i = channel % kChannels;
  float top = -INFINITY;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) top = fmaxf(top, slices.top[group][thread].values[i]);
  const float base = PooledRows::finite_base(top);
  float sum = 0.0f, value = 0.0f;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const float scale = expf(slices.top[group][thread].values[i] - base);
    sum = fmaf(slices.sum[group][thread].values[i], scale, sum);
    value = fmaf(slices.value[group][thread].values[i], scale, value);
  }
  return sum == 0.0f ? 0.0f : value / sum;
}

template <typename T, int Blocks>
__global__ void __cluster_dims__(Blocks, 1, 1) __launch_bounds__(kSliceThreads, 2)
    compress_flush_long_kernel(const __grid_constant__ CompressFlush call) {
  await_previous_grid();
  __shared__ Slices slices;
  __shared__ alignas(
      16) float entry[2][Blocks * kSlice];  // of the first block; the next entry comes while one is finished
  __shared__ float scratch[kMaxThreads / kWarpLanes];
  const int thread = threadIdx.x, rank = blockIdx.x % Blocks;
  const int group = thread / kGroupThreads, group_thread = thread % kGroupThreads;
  const int channel = rank * kSlice + kChannels * group_thread;
  const int first = blockIdx.x / Blocks * call.tokens_a_task;
  const int last = min(first + call.tokens_a_task, call.tokens);
  Request request = {-1, -1, -1, 0, -1};
  bool started = false;  // whether the first block is known to run
  int turn = 0;
  __cluster_barrier_arrive_relaxed();
  for (int token = first; token < last; ++token) {
    if (!request.holds(token)) request = find_request(call, token);
    if (request.index < 0) continue;
    // The first block has the most to do: the last one begins with the row of the token.
    const int row_thread = (Blocks - 1 - rank) * kSliceThreads + thread;
    const uint32_t position = static_cast<uint32_t>(request.position(token));
    if ((position + 1) % call.ratio != 0) {
      store_token<T>(call, request, token, row_thread, Blocks * kSliceThreads);
      continue;
    }
    const int block = position / call.ratio;
    PooledRows pooled;
    bool complete = true;
    for (int row = group; row < call.window(); row += kGroups * kRows) {
      const Rows rows = load_rows<T>(call, request, block, row, kGroups, channel);
      store_successors<T>(call, request, rows);
      pooled.add(rows.score, rows.kv);
      complete &= rows.complete;
    }
    // On their way while the sums meet; before, their registers are wanted for rows.
    int64_t index = destination(call, request, token, block);
    const Finish finish = load_finish(call, block, kChannels * thread);
    slices.top[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.top);
    slices.sum[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.sum);
    slices.value[group][group_thread] = reinterpret_cast<const Four<float>&>(pooled.value);
    if (!__syncthreads_and(complete) || !call.pages.holds(index) || block * call.ratio >= call.positions) index = -1;
    if (!started) __cluster_barrier_wait();
    started = true;
    if (thread < kSlice) store_to_block(&entry[turn % 2][rank * kSlice + thread], result_of_slices(slices, thread), 0);
    __cluster_barrier_arrive();
    store_token<T>(call, request, token, row_thread, Blocks * kSliceThreads);
    __cluster_barrier_wait();
    if (rank == 0 && index >= 0) {
      float values[kChannels] = {};
      if (thread < Blocks * kSlice / kChannels)
        reinterpret_cast<Four<float>&>(values) = reinterpret_cast<const Four<float>*>(entry[turn % 2])[thread];
      finish_entry(call, index, finish, kChannels * thread, values, scratch);
    }
    ++turn;
  }
  if (!started) __cluster_barrier_wait();
}

// Tokens in turn in one block or cluster: few enough that every multiprocessor has several of them to choose from.
static int32_t tokens_a_task(const Device& device, int64_t tokens, int64_t tasks_a_multiprocessor) {
  return static_cast<int32_t>(blocks_for(tokens, device.multiprocessors * tasks_a_multiprocessor));
}

constexpr int64_t kShortTasks = 16;  // of 128 threads, on one multiprocessor
constexpr int64_t kLongTasks = 2;    // of 2048 threads

template <typename T>
static dsv4_status launch_for(const LaunchTarget& target, CompressFlush& call) {
  if (call.window() <= kRows) {
    call.tokens_a_task = tokens_a_task(*target.device, call.tokens, kShortTasks);
    const uint32_t threads = call.head_dim / kChannels;
    return launch<compress_flush_kernel<T>>(target, {blocks_for(call.tokens, call.tokens_a_task), threads}, call);
  }
  const auto launch_long = [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    call.tokens_a_task = tokens_a_task(*target.device, call.tokens, kLongTasks * kMaxHeadDim / call.head_dim);
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
  check.range("kv rows (tokens)", tokens, 0, INT32_MAX);
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
  check_pages(check, args.pages, layout, args.entries_per_page);
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
  call.pages = pages_of(args.pages, args.entries_per_page);
  call.kv_stride = args.kv.stride[0];
  call.score_stride = args.score.stride[0];
  call.state_pages = extent(args.state, 0);
  call.positions = extent(args.cos_sin, 0);
  call.layout = page_layout(layout);
  call.quantization = {args.amax_floor, args.scale_floor, args.fp4_ties_toward_zero != 0, args.exact_scale != 0};
  call.tokens = static_cast<int32_t>(tokens);
  call.requests = static_cast<int32_t>(requests);
  call.tokens_a_request = static_cast<int32_t>(std::max<int64_t>(tokens / requests, 1));
  call.head_dim = layout.head_dim;
  call.width = static_cast<int32_t>(width);
  call.ratio = args.ratio;
  call.state_rows = static_cast<int32_t>(state_rows);
  call.state_columns = static_cast<int32_t>(state_columns);
  call.capacity = static_cast<int32_t>(std::min<int64_t>(state_rows * state_columns, INT32_MAX));
  call.blocks_a_request = static_cast<int32_t>(extent(args.block_table, 1));
  call.epsilon = args.epsilon;
  call.overlap = args.overlap != 0;
  call.hadamard = args.hadamard != 0;
  call.round_once = args.round_once != 0;
  return args.kv.dtype == DSV4_BFLOAT16 ? launch_for<__nv_bfloat16>(target, call) : launch_for<float>(target, call);
}
