// The maximum that a NaN gets through: what the scale of a block is taken from, as a block that holds a NaN has a scale
// that is one (docs/formats.md). An instruction like fmaxf(), which passes NaN over.
#pragma once

namespace dsv4 {

// The larger one; NaN if one is.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace dsv4
