#include <dsv4/router.h>

#include <algorithm>

#include "core/check.h"
#include "core/launch.h"
#include "device/activation.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"
#include "device/top_k.cuh"
#include "router/activation_topk_policy.h"
#include "router/weigh_slot.cuh"

namespace dsv4 {

constexpr int kThreads = 128;  // so that small batches use all four schedulers of a multiprocessor

struct Gate {
  const float* bias;
  const float* bias_alt;
  const bool* bias_alt_mask;
  const bool* padding_mask;
  float* weights;
  void* ids;
  int64_t tokens;
  int64_t logits_stride;
  int32_t experts;
  int32_t top_k;
  int32_t score_function;
  bool renormalize;
  bool wide_ids;  // int64
  bool logits_in_fours;
  bool bias_in_fours;
  float scale;
  float epsilon;
};

// The smallest normal number: sqrt_softplus() returns 0 for smaller scores.
constexpr float kLeastScore = 1.17549435e-38f;

// Softmax over the logits that are not NaN; infinite logits as the limit. NaN stays NaN.
template <int Lanes, int Slots>
__device__ void softmax(float (&values)[Slots], int lane, int experts) {
  float highest = -INFINITY;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (group_column<Lanes>(lane, slot) < experts) highest = fmaxf(highest, values[slot]);  // fmaxf ignores NaN
  for (int distance = Lanes / 2; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, distance));
  float sum = 0.0f;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    values[slot] = values[slot] == highest ? 1.0f : expf(values[slot] - highest);
    if (group_column<Lanes>(lane, slot) < experts && !isnan(values[slot])) sum += values[slot];
  }
  sum = sum_over_group(sum, Lanes);
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    values[slot] /= sum;
    if (values[slot] < kLeastScore) values[slot] = 0.0f;
  }
}

template <int Lanes, int Slots>
__device__ void activate(float (&values)[Slots], int lane, int experts, int score_function) {
  if (score_function == DSV4_SQRT_SOFTPLUS) {
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot) values[slot] = sqrt_softplus(values[slot]);
  } else if (score_function == DSV4_SIGMOID) {
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot) {
      values[slot] = 1.0f / (1.0f + expf(-values[slot]));
      if (values[slot] < kLeastScore) values[slot] = 0.0f;
    }
  } else {
    softmax<Lanes>(values, lane, experts);
  }
}

// One group of lanes per token: the row stays in registers from the load to the last comparison; a copy in shared
// memory serves lookups by column. Whole: the row fills all slots and is read with vector loads. With half a warp per
// token, the instructions that do not depend on the number of columns serve twice as many tokens; eight such blocks fit
// on a multiprocessor.
template <typename Logit, int Lanes, int Slots, bool Whole>
__global__ void __launch_bounds__(kThreads, Lanes == kWarpLanes ? 1 : 8)
    activation_topk_kernel(const Logit* __restrict__ logits, Gate gate) {
  await_previous_grid();
  constexpr int kTokens = kThreads / Lanes;
  __shared__ alignas(16) float all_scores[kTokens][Lanes * Slots];
  __shared__ alignas(16) float all_sums[kTokens][Lanes * Slots];  // of score and bias
  __shared__ alignas(16) TopKScratch<Lanes> scratch[kTokens];
  const int lane = threadIdx.x % Lanes, group = threadIdx.x / Lanes;
  const int experts = Whole ? Lanes * Slots : gate.experts;
  const int64_t own_token = static_cast<int64_t>(blockIdx.x) * kTokens + group;
  const int64_t token = min(own_token, gate.tokens - 1);  // all lanes of a warp take part in the shuffles

  float values[Slots];
  load_group_row<Lanes>(logits + token * gate.logits_stride, lane, experts, Whole || gate.logits_in_fours, values);
  const bool padding = gate.padding_mask && gate.padding_mask[token];
  const bool marked = gate.bias_alt_mask && gate.bias_alt_mask[token];
  const float* const bias = marked ? gate.bias_alt : gate.bias;
  // Loaded with the row, the bias costs no latency; loaded after it, no registers, and other warps hide the latency.
  constexpr bool kLateBias = Lanes < kWarpLanes;
  float biases[Slots] = {};
  if (!kLateBias && bias) load_group_row<Lanes>(bias, lane, experts, Whole || gate.bias_in_fours, biases);

  activate<Lanes>(values, lane, experts, gate.score_function);
  store_group_row<Lanes>(values, lane, all_scores[group]);
  if (kLateBias) {
    asm volatile("" ::: "memory");
    if (bias) load_group_row<Lanes>(bias, lane, experts, Whole || gate.bias_in_fours, biases);
  }
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    values[slot] = group_column<Lanes>(lane, slot) < experts ? values[slot] + biases[slot] : NAN;
  store_group_row<Lanes>(values, lane, all_sums[group]);
  __syncwarp();
  const Chosen chosen =
      group_top_k<Lanes>(values, experts, gate.top_k, lane, all_sums[group], all_scores[group], scratch[group]);

  // The same order for any number of lanes: those from k on add zeros.
  const auto logit = [&] {
    if (chosen.column == kNoColumn) return NAN;
    return static_cast<float>(logits[token * gate.logits_stride + chosen.column]);
  };
  const float slope = gate.score_function == DSV4_SQRT_SOFTPLUS ? kSqrtSoftplusSlope : kLinearSlope;
  const float weight = weigh_slot(chosen.payload, logit, slope, gate.top_k <= kFewResults ? kFewResults : Lanes,
                                  gate.renormalize, gate.scale, gate.epsilon);
  if (lane >= gate.top_k || token != own_token) return;
  const int64_t out = token * gate.top_k + lane;
  const int64_t id = padding ? int64_t{-1} : chosen.column;
  gate.weights[out] = padding ? 0.0f : weight;
  if (gate.wide_ids)
    static_cast<int64_t*>(gate.ids)[out] = id;
  else
    static_cast<int32_t*>(gate.ids)[out] = static_cast<int32_t>(id);
}

template <typename Logit, int Lanes, int Slots, bool Whole>
static dsv4_status route(const LaunchTarget& target, const Logit* logits, const Gate& gate) {
  return launch<activation_topk_kernel<Logit, Lanes, Slots, Whole>>(
      target, {blocks_for(gate.tokens, kThreads / Lanes), kThreads}, logits, gate);
}

// The kernel for this number of experts; specialised for the models' 256 and 384.
template <typename Logit>
static dsv4_status route(const LaunchTarget& target, const Logit* logits, const Gate& gate) {
  const bool whole = gate.logits_in_fours && gate.bias_in_fours;
  // The softmax sum depends on the number of lanes, which must not change with the batch.
  const bool can_halve = gate.top_k <= kFewResults && gate.score_function != DSV4_SOFTMAX;
  const bool many = activation_topk_policy(*target.device, {gate.tokens, can_halve}).lanes == 16;
  if (whole && gate.experts == 256)
    return many ? route<Logit, 16, 16, true>(target, logits, gate) : route<Logit, 32, 8, true>(target, logits, gate);
  if (whole && gate.experts == 384)
    return many ? route<Logit, 16, 24, true>(target, logits, gate) : route<Logit, 32, 12, true>(target, logits, gate);
  return with_slots(gate.experts, [&](auto slots) {
    return route<Logit, kWarpLanes, decltype(slots)::value, false>(target, logits, gate);
  });
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_activation_topk(const dsv4_activation_topk_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("activation_topk");
  const dsv4_activation_topk_args args = check.read(given);
  const int64_t tokens = extent(args.logits, 0);
  const int64_t experts = extent(args.logits, 1);
  check.tensor("logits", args.logits, one_of(DSV4_FLOAT32, DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.range("logits columns (experts)", experts, 1, kMaxWarpColumns);
  check.optional_tensor("bias", args.bias, one_of(DSV4_FLOAT32), {experts});
  check.range("top_k", args.top_k, 1, std::min<int64_t>(experts, DSV4_MAX_TOP_K));
  check.range("score_function", args.score_function, DSV4_SQRT_SOFTPLUS, DSV4_SOFTMAX);
  check.flag("renormalize", args.renormalize);
  check.number("scale", args.scale);
  check.number("epsilon", args.epsilon, 0.0f);
  check.optional_tensor("padding_mask", args.padding_mask, one_of(DSV4_BOOL), {tokens});
  check.optional_tensor("bias_alt", args.bias_alt, one_of(DSV4_FLOAT32), {experts});
  check.optional_tensor("bias_alt_mask", args.bias_alt_mask, one_of(DSV4_BOOL), {tokens});
  if (present(args.bias_alt_mask)) check.tensor("bias_alt", args.bias_alt, one_of(DSV4_FLOAT32), {experts});
  if (present(args.bias_alt)) check.tensor("bias_alt_mask", args.bias_alt_mask, one_of(DSV4_BOOL), {tokens});
  check.tensor("out_weights", args.out_weights, one_of(DSV4_FLOAT32), {tokens, args.top_k});
  check.tensor("out_ids", args.out_ids, one_of(DSV4_INT32, DSV4_INT64), {tokens, args.top_k});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  Gate gate = {};
  gate.bias = static_cast<const float*>(args.bias.data);
  gate.bias_alt = static_cast<const float*>(args.bias_alt.data);
  gate.bias_alt_mask = static_cast<const bool*>(args.bias_alt_mask.data);
  gate.padding_mask = static_cast<const bool*>(args.padding_mask.data);
  gate.weights = static_cast<float*>(args.out_weights.data);
  gate.ids = args.out_ids.data;
  gate.tokens = tokens;
  gate.logits_stride = args.logits.stride[0];
  gate.experts = static_cast<int32_t>(experts);
  gate.top_k = args.top_k;
  gate.score_function = args.score_function;
  gate.renormalize = args.renormalize != 0;
  gate.wide_ids = args.out_ids.dtype == DSV4_INT64;
  gate.logits_in_fours = in_fours(args.logits);
  gate.bias_in_fours =
      (!present(args.bias) || in_fours(args.bias)) && (!present(args.bias_alt) || in_fours(args.bias_alt));
  gate.scale = args.scale;
  gate.epsilon = args.epsilon;
  return with_row_type(args.logits.dtype, [&](auto logit) {
    return route(target, static_cast<const decltype(logit)*>(args.logits.data), gate);
  });
}
