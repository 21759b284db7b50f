// Scalar activations in float32, accurate in relative terms over the whole range.
#pragma once

namespace dsv4 {

// sqrt(log(1 + e^x)), the score function of DeepSeek-V4's gate.
// Below kLinear, log(1 + e^x) is e^x to the last bit of float32, and e^(x/2) keeps its digits where e^x is subnormal.
__device__ inline float sqrt_softplus(float x) {
  constexpr float kLinear = -17.0f;
  return x < kLinear ? expf(0.5f * x) : sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

}  // namespace dsv4
