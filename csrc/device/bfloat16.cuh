// bfloat16 values in pairs, as 32-bit words hold them: the first in the low half.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dsv4 {

__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Both rounded to nearest even.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The words of a 16-byte load, by numbers that the compiler knows.
__device__ inline uint32_t& word_of(uint4& words, int i) { return reinterpret_cast<uint32_t*>(&words)[i]; }
__device__ inline uint32_t word_of(const uint4& words, int i) { return reinterpret_cast<const uint32_t*>(&words)[i]; }

__device__ inline void unpack_eight(uint4 words, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = low_half(word_of(words, i));
    values[2 * i + 1] = high_half(word_of(words, i));
  }
}

__device__ inline uint4 pack_eight(const float (&values)[8]) {
  return {pack_bfloat16(values[0], values[1]), pack_bfloat16(values[2], values[3]), pack_bfloat16(values[4], values[5]),
          pack_bfloat16(values[6], values[7])};
}

}  // namespace dsv4
