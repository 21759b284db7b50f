// The way from a token's scores to its weights.
#pragma once

#include "device/reduce.cuh"

namespace dsv4 {

// The weight of a slot from its score, 0 where there is none; `group` neighbouring lanes hold the token's slots. Every
// lane of the warp must call it.
__device__ inline float weigh_slot(float score, int group, bool renormalize, float scale, float epsilon) {
  if (isnan(score)) score = 0.0f;
  const float denominator = sum_over_group(score, group) + epsilon;
  // A division of 0 takes the slow way that denormals take, and the lanes of a group that have no slot would take it.
  const bool divides = renormalize && denominator != 0.0f && score != 0.0f;
  return (divides ? score / denominator : score) * scale;
}

}  // namespace dsv4
