// Weights of a token's chosen experts from their scores. aot/router/device/selection.py does the same.
#pragma once

#include "device/reduce.cuh"

namespace dsv4 {

// A smaller sum of scores has lost precision to scores below the normal range of float32.
constexpr float kLeastSum = 5.4210109e-20f;  // 2^-64

// For logits far below 0 a score is proportional to e^(slope * logit).
constexpr float kSqrtSoftplusSlope = 0.5f;
constexpr float kLinearSlope = 1.0f;  // of sigmoid and softmax

// A slot's share of the weight when the scores are infinite or underflow, among `group` slots: infinite logits share
// the whole weight equally; tiny scores are e^(slope * logit) times a common factor. Both are e^(slope * (logit -
// maximum)) divided by the sum of these. 0 for a logit that is NaN or -inf.
__device__ inline float limit_share(float logit, float slope, int group) {
  float highest = logit;
  for (int distance = group / 2; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, distance));  // fmaxf ignores NaN
  // The comparison also avoids inf - inf in the exponent.
  float power = logit == highest ? 1.0f : expf(slope * (logit - highest));
  if (!(logit > -INFINITY)) power = 0.0f;
  const float sum = sum_over_group(power, group);
  return sum > 0.0f ? power / sum : 0.0f;
}

// The weight of a slot from its score, which is 0 for an absent slot; `group` adjacent lanes hold the token's slots.
// Every lane of the warp must call it. logit(): the slot's logit, NaN if absent; called only if the scores do not
// suffice.
template <typename Logit>
__device__ inline float weigh_slot(float score, Logit&& logit, float slope, int group, bool renormalize, float scale,
                                   float epsilon) {
  if (isnan(score)) score = 0.0f;
  const float sum = sum_over_group(score, group);
  const float denominator = sum + epsilon;
  // Dividing 0 takes the slow path of IEEE division; lanes without a slot, whose score is 0, skip it.
  const bool divides = renormalize && denominator != 0.0f && score != 0.0f;
  float share = divides ? score / denominator : score;
  // An epsilon is far larger than the scores that underflow.
  const bool limit = renormalize && (isinf(sum) || (sum < kLeastSum && epsilon == 0.0f));
  if (__any_sync(kFullWarp, limit)) {
    const float by_limit = limit_share(logit(), slope, group);
    if (limit) share = by_limit;
  }
  return scale == 0.0f ? 0.0f : share * scale;  // without `renormalize` a share may be infinite
}

}  // namespace dsv4
