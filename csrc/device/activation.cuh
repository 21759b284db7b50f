// Scalar activations in float32, accurate in relative terms over the whole range.
#pragma once

#include "device/max_or_nan.cuh"

namespace dsv4 {

__device__ inline float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline float sqrt_approx(float x) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// sqrt(log(1 + e^x)), the score function of DeepSeek-V4's gate, to about 2 units in the last place for x above -174,
// where it leaves the normal range of float32. A third of the instructions of
// sqrtf(fmaxf(x, 0) + log1pf(expf(-fabsf(x)))), without a branch, as a gate computes it for every expert.
// aot/router/device/activation.py does the same.
__device__ inline float sqrt_softplus(float x) {
  // root = e^(-|x|/2). The exponent is split in two parts, as its rounding error would become the result's.
  constexpr float kHalfLog2e = 0.72134752f, kHalfLog2eRest = 9.6298149e-09f, kLn2 = 0.69314718f;
  constexpr float kFlat = 200.0f;  // beyond, e^(-|x|/2) is 0; keeps infinities out of the two parts
  const float size = fminf(fabsf(x), kFlat);
  const float exponent = -size * kHalfLog2e;
  const float rest = fmaf(-size, kHalfLog2e, -exponent) - size * kHalfLog2eRest;
  float root = exp2_approx(exponent);
  root = fmaf(root * kLn2, rest, root);

  // log(1 + u) = u * P(u) on [0, 1]; P is the polynomial of degree 9 of least relative error, 5e-9.
  const float u = root * root;
  float p = -0.0032440233f;
  p = fmaf(p, u, 0.0198514536f);
  p = fmaf(p, u, -0.0569595173f);
  p = fmaf(p, u, 0.106036536f);
  p = fmaf(p, u, -0.153055921f);
  p = fmaf(p, u, 0.196759388f);
  p = fmaf(p, u, -0.249541342f);
  p = fmaf(p, u, 0.333299637f);
  p = fmaf(p, u, -0.499999017f);
  p = fmaf(p, u, 1.0f);
  const float score = sqrt_approx(fmaf(p, u, max_or_nan(x, 0.0f)));

  // Below, log(1 + e^x) is e^x to the last bit of float32, and the root keeps its digits where e^x is subnormal.
  constexpr float kLinear = -17.0f;
  return x < kLinear ? root : score;
}

}  // namespace dsv4
