// SwiGLU in float32. aot/moe/device/swiglu.py has it for Triton, with the same bits.
#pragma once

namespace dsv4 {

// x / (1 + e^-x), with a relative error of at most 2^-17 wherever that is a normal number; below (x < -92) it may be 0.
// 2^-8 (1 + e^-x) stays below 2^126, above which rcp.approx.ftz gives 0; so the factor is on both sides of the
// division.
__device__ __forceinline__ float silu(float x) {
  float result;
  asm("{\n"
      ".reg .f32 t, u;\n"
      "fma.rn.f32 t, %1, 0fBFB8AA3B, 0fC1000000;\n"  // -x log2(e) - 8
      "ex2.approx.ftz.f32 t, t;\n"
      "add.f32 t, t, 0f3B800000;\n"  // 2^-8
      "rcp.approx.ftz.f32 t, t;\n"
      "mul.f32 u, %1, 0f3B800000;\n"
      "mul.f32 %0, u, t;\n"
      "}"
      : "=f"(result)
      : "f"(x));
  return result;
}

// silu(min(gate, limit)) * clamp(up, -limit, limit), as the models' published inference code has it. limit: infinity
// for none. Comparisons and not fminf() and fmaxf(): NaN stays NaN.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return silu(gate) * up;
}

}  // namespace dsv4
