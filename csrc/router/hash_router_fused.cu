#include "core/dtype.h"
#include "core/launch.h"
#include "device/activation.cuh"
#include "device/cluster.cuh"
#include "device/indices.cuh"
#include "device/reduce.cuh"
#include "router/hash_lookup.cuh"
#include "router/hash_router_fused_policy.h"
#include "router/weigh_slot.cuh"

namespace dsv4 {

// A token is computed by 512 threads in 1 to 8 blocks; see hash_router_fused_policy(). The assignment of products to
// threads and the order of the sums do not depend on the number of blocks: results are batch-invariant.
constexpr int kTokenThreads = 512;
constexpr int kTokenWarps = kTokenThreads / kWarpLanes;
constexpr int kSlots = 6;                 // rows read at once; the models choose 6 experts, more take more passes
constexpr int kChunk = 8;                 // bfloat16 values per 16-byte load
constexpr int kStep = 2 * kTokenThreads;  // chunks of a row in flight: 8192 values, the whole of the models' rows

__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Adds a[0] * b[0], a[1] * b[1], ... to each row's sum, in this order, of 8 bfloat16 values each.
__device__ inline void add_products(float (&sums)[8], uint4 a, const uint4 (&rows)[kSlots]) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const uint32_t pairs[4][2] = {{a.x, rows[i].x}, {a.y, rows[i].y}, {a.z, rows[i].z}, {a.w, rows[i].w}};
#pragma unroll
    for (const auto& pair : pairs) {
      sums[i] = fmaf(low_half(pair[0]), low_half(pair[1]), sums[i]);
      sums[i] = fmaf(high_half(pair[0]), high_half(pair[1]), sums[i]);
    }
  }
}

// Bound by latency: token id, table row and weight rows are three dependent loads, and one multiprocessor then takes up
// to a microsecond to load k rows. So the hidden state is loaded before that chain begins, all rows are in flight at
// once, and the blocks of a cluster share a token. Each warp stores its sums to the cluster's first block, where one
// warp adds them and finishes.
//
// Strides are in bytes. A thread takes the chunks thread, thread + 512, ... of its token's rows. Launch bounds of one
// block per multiprocessor let the compiler spend registers on loads in flight.
template <int Blocks>
__global__ void __cluster_dims__(Blocks, 1, 1) __launch_bounds__(kTokenThreads / Blocks, 1)
    hash_router_fused_kernel(StridedIndices token_ids, Indices table, const bool* __restrict__ padding_mask,
                             const char* __restrict__ hidden, const char* __restrict__ weight,
                             float* __restrict__ weights, OutIndices ids, int64_t vocab, int64_t experts,
                             int64_t hidden_stride, uint32_t weight_stride, int chunks, int top_k, int group,
                             bool renormalize, float scale, float epsilon) {
  await_previous_grid();
  __shared__ float warp_sums[kTokenWarps][DSV4_MAX_TOP_K];
  __shared__ ByteBarrier sums_complete;
  const int64_t token = blockIdx.x / Blocks;
  const int thread = blockIdx.x % Blocks * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = lookup_row(token_ids, padding_mask, token, vocab);

  const uint4* const token_hidden = reinterpret_cast<const uint4*>(hidden + token * hidden_stride);
  uint4 values[2];
  const auto load_hidden = [&](int chunk) {
    if (chunk < chunks) values[0] = token_hidden[chunk];
    if (chunk + kTokenThreads < chunks) values[1] = token_hidden[chunk + kTokenThreads];
  };
  load_hidden(thread);
  if constexpr (Blocks > 1) {
    if (thread == 0) expect_bytes(&sums_complete, kTokenWarps * top_k * sizeof(float));
    __cluster_barrier_arrive_relaxed();
  }

  // Lane j of every warp has the expert of slot j. Without an expert, row 0 is read and the product is not used.
  const int64_t entry = row >= 0 && lane < top_k ? table[row * top_k + lane] : kNoExpert;
  if constexpr (Blocks > 1)
    __cluster_barrier_wait();  // the first block can receive; hidden behind the load of the entry
  const bool routed = entry >= 0 && entry < experts;
  const uint32_t expert = routed ? static_cast<uint32_t>(entry) : 0;

  for (int first = 0; first < top_k; first += kSlots) {
    const uint4* rows[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t slot_expert = __shfl_sync(kFullWarp, expert, first + i);
      rows[i] = reinterpret_cast<const uint4*>(weight + static_cast<uint64_t>(slot_expert) * weight_stride);
    }
    float sums[8] = {};
    for (int chunk = thread; chunk < chunks; chunk += kStep) {
      const bool second = chunk + kTokenThreads < chunks;
      uint4 near[kSlots], far[kSlots];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) near[i] = rows[i][chunk];
      if (second)
#pragma unroll
        for (int i = 0; i < kSlots; ++i) far[i] = rows[i][chunk + kTokenThreads];
      add_products(sums, values[0], near);
      if (second) add_products(sums, values[1], far);
      const int next = chunk + kStep < chunks ? chunk + kStep : thread;  // thread: for the next slots
      if (next != chunk) load_hidden(next);
    }
    const float sum = sum_each_over_warp(sums);
    const int slot = first + lane / 4;
    if (lane % 4 == 0 && lane / 4 < kSlots && slot < top_k) {
      float* const place = &warp_sums[thread / kWarpLanes][slot];
      if constexpr (Blocks > 1)
        store_to_block(place, sum, &sums_complete, 0);
      else
        *place = sum;
    }
  }
  if constexpr (Blocks == 1) __syncthreads();
  if (thread >= kWarpLanes) return;
  if constexpr (Blocks > 1) wait_for_bytes(&sums_complete);

  float logit = NAN, score = 0.0f;
  if (routed) {
    logit = 0.0f;
#pragma unroll
    for (int i = 0; i < kTokenWarps; i += 4)
      logit += (warp_sums[i][lane] + warp_sums[i + 1][lane]) + (warp_sums[i + 2][lane] + warp_sums[i + 3][lane]);
    score = sqrt_softplus(logit);
  }
  const float routing_weight =
      weigh_slot(score, [&] { return logit; }, kSqrtSoftplusSlope, group, renormalize, scale, epsilon);
  if (lane >= top_k) return;
  ids.store(token * top_k + lane, routed ? static_cast<int32_t>(expert) : kNoExpert);
  weights[token * top_k + lane] = routing_weight;
}

template <typename Function>
static dsv4_status with_constant(int blocks, Function&& function) {
  switch (blocks) {
    case 8: return function(std::integral_constant<int, 8>{});
    case 4: return function(std::integral_constant<int, 4>{});
    case 2: return function(std::integral_constant<int, 2>{});
    default: return function(std::integral_constant<int, 1>{});
  }
}
}  // namespace dsv4

extern "C" int64_t dsv4_hash_router_fused_max_bytes(void) { return dsv4::kHashRouterFusedMaxBytes; }

extern "C" dsv4_status dsv4_hash_router_fused(const dsv4_hash_router_fused_args* given, dsv4_stream stream) {
  using namespace dsv4;
  constexpr int64_t kLoadBytes = sizeof(uint4);
  Check check("hash_router_fused");
  const dsv4_hash_router_fused_args args = check.read(given);
  const int top_k = static_cast<int>(check_hash_lookup(check, args));
  const int64_t tokens = extent(args.token_ids, 0);
  const int64_t hidden_size = extent(args.hidden, 1);
  const int64_t experts = extent(args.weight, 0);
  check.range("token_ids rows (tokens)", tokens, 0, INT32_MAX);
  check.tensor("hidden", args.hidden, one_of(DSV4_BFLOAT16), {tokens, kAny}, Layout::kStridedRows);
  check.range("hidden columns", hidden_size, kChunk, INT32_MAX);
  check.multiple("hidden columns", hidden_size, kChunk);
  check.aligned_rows("hidden", args.hidden, kLoadBytes);
  check.tensor("weight", args.weight, one_of(DSV4_BFLOAT16), {kAny, hidden_size}, Layout::kStridedRows);
  check.range("weight rows (experts)", experts, 0, INT32_MAX);
  check.aligned_rows("weight", args.weight, kLoadBytes);
  const int64_t weight_stride = experts > 1 ? saturating_product(args.weight.stride[0], dtype_bytes(DSV4_BFLOAT16)) : 0;
  check.range("weight row stride (bytes)", weight_stride, 0, UINT32_MAX);
  check.flag("renormalize", args.renormalize);
  check.number("scale", args.scale);
  check.number("epsilon", args.epsilon, 0.0f);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  const int64_t hidden_stride = args.hidden.stride[0] * dtype_bytes(DSV4_BFLOAT16);
  const int64_t chunks = experts > 0 ? hidden_size / kChunk : 0;  // without experts there is no row 0 to read
  return with_constant(hash_router_fused_policy(*target.device, tokens).blocks, [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    return launch<hash_router_fused_kernel<kBlocks>>(
        target, {static_cast<uint32_t>(tokens * kBlocks), kTokenThreads / kBlocks}, strided_indices_of(args.token_ids),
        indices_of(args.hash_lut), static_cast<const bool*>(args.padding_mask.data),
        static_cast<const char*>(args.hidden.data), static_cast<const char*>(args.weight.data),
        static_cast<float*>(args.out_weights.data), out_indices_of(args.out_ids), extent(args.hash_lut, 0), experts,
        hidden_stride, weight_stride, chunks, top_k, group_for(top_k), args.renormalize != 0, args.scale, args.epsilon);
  });
}
