#include <dsv4/router.h>

#include <algorithm>

#include "core/check.h"
#include "core/launch.h"
#include "device/activation.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"
#include "device/top_k.cuh"

namespace dsv4 {

constexpr int kTokensPerBlock = 4;  // a warp each, so that a few tokens still find the multiprocessor's four schedulers

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

// A logit that is infinite counts as the limit; one that is not a number is left out and keeps its NaN.
template <int Slots>
__device__ void softmax(float (&values)[Slots], int lane, int experts) {
  float highest = -INFINITY;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (warp_column(lane, slot) < experts) highest = fmaxf(highest, values[slot]);  // fmaxf passes NaN over
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, distance));
  float sum = 0.0f;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    values[slot] = values[slot] == highest ? 1.0f : expf(values[slot] - highest);
    if (warp_column(lane, slot) < experts && !isnan(values[slot])) sum += values[slot];
  }
  sum = sum_over_group(sum, kWarpLanes);
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) values[slot] /= sum;
}

template <int Slots>
__device__ void activate(float (&values)[Slots], int lane, int experts, int score_function) {
  if (score_function == DSV4_SQRT_SOFTPLUS) {
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot) values[slot] = sqrt_softplus(values[slot]);
  } else if (score_function == DSV4_SIGMOID) {
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot) values[slot] = 1.0f / (1.0f + expf(-values[slot]));
  } else {
    softmax(values, lane, experts);
  }
}

// A warp a token: the row is in registers from the load to the last comparison. Only the scores, of which the chosen
// ones are wanted again at the end, go through shared memory.
template <typename Logit, int Slots>
__global__ void __launch_bounds__(kTokensPerBlock* kWarpLanes)
    activation_topk_kernel(const Logit* __restrict__ logits, Gate gate) {
  await_previous_grid();
  __shared__ Four<float> all_scores[kTokensPerBlock][kWarpLanes * Slots / kFour];
  __shared__ TopKScratch scratch[kTokensPerBlock];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + warp;
  if (token >= gate.tokens) return;

  float values[Slots];
  load_warp_row(logits + token * gate.logits_stride, lane, gate.experts, gate.logits_in_fours, values);
  const bool padding = gate.padding_mask && gate.padding_mask[token];
  const bool marked = gate.bias_alt_mask && gate.bias_alt_mask[token];
  const float* const bias = marked ? gate.bias_alt : gate.bias;
  float biases[Slots] = {};
  if (bias) load_warp_row(bias, lane, gate.experts, gate.bias_in_fours, biases);

  activate(values, lane, gate.experts, gate.score_function);
#pragma unroll
  for (int i = 0; i < Slots / kFour; ++i)
    all_scores[warp][i * kWarpLanes + lane] = {values[i * kFour], values[i * kFour + 1], values[i * kFour + 2],
                                               values[i * kFour + 3]};
  uint32_t keys[Slots];
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    keys[slot] = warp_column(lane, slot) < gate.experts ? descending_key(values[slot] + biases[slot]) : kNoKey;
  __syncwarp();
  const uint64_t entry = warp_top_k(keys, gate.top_k, lane, scratch[warp]);

  const uint32_t expert = entry_column(entry);
  float score = 0.0f;
  if (entry != kNoEntry) score = all_scores[warp][expert / kFour].values[expert % kFour];
  if (isnan(score)) score = 0.0f;
  const float denominator = sum_over_group(score, kWarpLanes) + gate.epsilon;
  if (lane >= gate.top_k) return;
  const float weight = (gate.renormalize && denominator != 0.0f ? score / denominator : score) * gate.scale;
  const int64_t out = token * gate.top_k + lane;
  const int64_t id = padding ? int64_t{-1} : expert;
  gate.weights[out] = padding ? 0.0f : weight;
  if (gate.wide_ids)
    static_cast<int64_t*>(gate.ids)[out] = id;
  else
    static_cast<int32_t*>(gate.ids)[out] = static_cast<int32_t>(id);
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
    return with_slots(experts, [&](auto slots) {
      using Logit = decltype(logit);
      return launch<activation_topk_kernel<Logit, decltype(slots)::value>>(
          target, {blocks_for(tokens, kTokensPerBlock), kTokensPerBlock * kWarpLanes},
          static_cast<const Logit*>(args.logits.data), gate);
    });
  });
}
