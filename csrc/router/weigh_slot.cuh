// The way from the scores of a token's chosen experts to their weights. aot/router/device/selection.py does the same.
#pragma once

#include "device/reduce.cuh"

namespace dsv4 {

// A sum of scores below this one has lost digits, or all of them, to scores below the normal range of float32.
constexpr float kLeastSum = 5.4210109e-20f;  // 2^-64

// How a score falls where the logit is far below 0: as e^(slope * logit).
constexpr float kSqrtSoftplusSlope = 0.5f;
constexpr float kLinearSlope = 1.0f;  // of sigmoid and softmax

// The share of a slot where scores do not tell it, out of `group` slots: where one is infinite, the infinite ones share
// the whole; where all are tiny, each is e^(slope * logit) but for a factor that they have in common. So both are
// e^(slope * (logit - the highest)), over their sum. 0 for a logit that is NaN or -inf.
__device__ inline float limit_share(float logit, float slope, int group) {
  float highest = logit;
  for (int distance = group / 2; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, distance));  // fmaxf passes NaN over
  // The comparison also keeps inf - inf out of the exponent.
  float power = logit == highest ? 1.0f : expf(slope * (logit - highest));
  if (!(logit > -INFINITY)) power = 0.0f;
  const float sum = sum_over_group(power, group);
  return sum > 0.0f ? power / sum : 0.0f;
}

// The weight of a slot from its score, 0 where there is none; `group` neighbouring lanes hold the token's slots. Every
// lane of the warp must call it. logit: called for the slot's logit, NaN where there is none, if the scores do not
// suffice.
template <typename Logit>
__device__ inline float weigh_slot(float score, Logit&& logit, float slope, int group, bool renormalize, float scale,
                                   float epsilon) {
  if (isnan(score)) score = 0.0f;
  const float sum = sum_over_group(score, group);
  const float denominator = sum + epsilon;
  // A division of 0 takes the slow way that denormals take, and the lanes of a group that have no slot would take it.
  const bool divides = renormalize && denominator != 0.0f && score != 0.0f;
  float share = divides ? score / denominator : score;
  // An epsilon is by far more than scores that are lost.
  const bool limit = renormalize && (isinf(sum) || (sum < kLeastSum && epsilon == 0.0f));
  if (__any_sync(kFullWarp, limit)) {
    const float by_limit = limit_share(logit(), slope, group);
    if (limit) share = by_limit;
  }
  return scale == 0.0f ? 0.0f : share * scale;  // without `renormalize` a share may be infinite
}

}  // namespace dsv4
