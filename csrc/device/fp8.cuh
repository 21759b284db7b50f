// FP8 E4M3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; largest value 448, no infinity. The conversion
// instructions exist on every architecture that is built for.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace dsv4 {

constexpr float kLargestE4m3 = 448.0f;

// The nearest codes, ties to the even one, saturated to +-448 (infinities too); `low` goes to the low byte. NaN gives
// 0x7f, whatever its sign.
__device__ inline uint32_t encode_e4m3x2(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

__device__ inline uint32_t encode_e4m3(float value) { return encode_e4m3x2(value, 0.0f); }

__device__ inline uint32_t encode_e4m3x4(float v0, float v1, float v2, float v3) {
  return encode_e4m3x2(v0, v1) | encode_e4m3x2(v2, v3) << 16;
}

// The values of the codes in the low and in the high byte.
__device__ inline float2 decode_e4m3x2(uint32_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return __half22float2(reinterpret_cast<const __half2&>(halves));
}

__device__ inline float decode_e4m3(uint32_t code) { return decode_e4m3x2(code).x; }

}  // namespace dsv4
