// The NaN-propagating maximum, from which block scales are computed: a block that holds a NaN has the scale NaN
// (docs/formats.md). One instruction, as fmaxf(), which ignores NaN.
#pragma once

namespace dsv4 {

// max(a, b); NaN if either is.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace dsv4
