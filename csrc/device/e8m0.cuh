// E8M0, the scale of the MX formats: byte e means 2^(e - 127); 255 is NaN.
//
// Every scaling rule in use is one of two functions of a group's largest magnitude (amax):
//
//     MXFP8                ceil_e8m0(amax / 448)
//     KV cache, FP8        ceil_e8m0(max(amax, 1e-4) / 448)
//     KV cache, MXFP4      ceil_e8m0(max(amax, 6 * 2^-126) / 6)
//     OCP MX 1.0           floor_e8m0(amax, 8) for E4M3, floor_e8m0(amax, 2) for E2M1: values may saturate
//
// with the quotient rounded to nearest in float32. Codes are then those of value * reciprocal_e8m0(e), which is exact
// but for underflow.
#pragma once

#include <cstdint>

#include "device/max_or_nan.cuh"

namespace dsv4 {

// The least power of two that is not below `scale`, 0 or more: 2^ceil(log2(scale)). 0 gives byte 0, infinity and NaN
// give 255. A scale in (0, 2^-126] gives byte 1, as in
// ((bits(scale) + 0x7fffff) & 0x7f800000) >> 23.
__device__ inline uint32_t ceil_e8m0(float scale) { return min((__float_as_uint(scale) + 0x7fffffu) >> 23, 255u); }

// ceil_e8m0(max(amax, floor) / largest), `largest` being the element format's. 255 for an amax that is NaN.
__device__ inline uint32_t ceil_e8m0_of_amax(float amax, float floor, float largest) {
  return ceil_e8m0(__fdiv_rn(max_or_nan(amax, floor), largest));
}

// The power of two in `amax`, 0 or more, divided by that in the element format's largest value (2^8 of E4M3, 2^2 of
// E2M1), as the OCP MX specification 1.0 has it. Infinity and NaN give 255.
__device__ inline uint32_t floor_e8m0(float amax, uint32_t largest_exponent) {
  const uint32_t exponent = __float_as_uint(amax) >> 23;
  return exponent == 255u ? 255u : exponent - min(exponent, largest_exponent);
}

// 2^(e - 127).
__device__ inline float decode_e8m0(uint32_t e) {
  const uint32_t bits = e == 0 ? 0x00400000u : e << 23;
  return __uint_as_float(e == 255u ? 0x7fffffffu : bits);
}

// 2^(127 - e), exact; NaN for 255.
__device__ inline float reciprocal_e8m0(uint32_t e) {
  const uint32_t bits = e == 254u ? 0x00400000u : (254u - e) << 23;
  return __uint_as_float(e == 255u ? 0x7fffffffu : bits);
}

}  // namespace dsv4
