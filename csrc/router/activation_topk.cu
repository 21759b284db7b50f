#include <dsv4/router.h>

#include <algorithm>

#include "core/check.h"
#include "core/launch.h"
#include "device/activation.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"
#include "device/top_k.cuh"
#include "router/activation_topk.h"
#include "router/activation_topk_policy.h"
#include "router/hash_lookup.cuh"
#include "router/image_bias.h"
#include "router/weigh_slot.cuh"

namespace dsv4 {

constexpr int kThreads = 128;  // so that small batches use all four schedulers of a multiprocessor

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

// A lane's slot of a token whose experts a table gives.
__device__ inline Chosen look_up(const Gate& gate, int64_t token, int lane, const float* scores) {
  const int64_t row = lookup_row(gate.token_ids, nullptr, token, gate.vocab);
  const int64_t expert = row >= 0 && lane < gate.top_k ? gate.table[row * gate.top_k + lane] : kNoExpert;
  if (expert < 0 || expert >= gate.experts) return {kNoColumn, 0.0f};
  return {static_cast<uint32_t>(expert), scores[expert]};
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
  Chosen chosen =
      group_top_k<Lanes>(values, experts, gate.top_k, lane, all_sums[group], all_scores[group], scratch[group]);
  if (gate.table.data && !marked) chosen = look_up(gate, token, lane, all_scores[group]);

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
  static_assert(static_cast<int32_t>(kNoColumn) == kNoExpert, "a slot without an expert");
  gate.weights[out] = padding ? 0.0f : weight;
  gate.ids.store(out, padding ? kNoExpert : static_cast<int32_t>(chosen.column));
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

dsv4_status route_by_logits(const LaunchTarget& target, const dsv4_tensor& logits, const Gate& gate) {
  return with_row_type(
      logits.dtype, [&](auto logit) { return route(target, static_cast<const decltype(logit)*>(logits.data), gate); });
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
  check_image_bias(check, args.bias_alt, args.bias_alt_mask, tokens, experts);
  check.tensor("out_weights", args.out_weights, one_of(DSV4_FLOAT32), {tokens, args.top_k});
  check.tensor("out_ids", args.out_ids, one_of(DSV4_INT32, DSV4_INT64), {tokens, args.top_k});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  Gate gate = gate_of(args, args.top_k);
  gate.bias = static_cast<const float*>(args.bias.data);
  gate.bias_in_fours = gate.bias_in_fours && (!present(args.bias) || in_fours(args.bias));
  gate.score_function = args.score_function;
  return route_by_logits(target, args.logits, gate);
}
