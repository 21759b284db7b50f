// FP4 E2M1: codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign. Packed with the even element in the low
// nibble.
#pragma once

#include <cstdint>

namespace dsv4 {

constexpr float kLargestE2m1 = 6.0f;

enum class Ties {
  kToEven,      // to the even code, as the hardware does: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5, 5 -> 2, 4
  kTowardZero,  // as in implementations that compare with thresholds: 0.75 -> 0.5
};

#if __CUDA_ARCH__ < 1000

// The code of |value|, plus kMagnitudeBase, without the instruction that sm_100 and later have. Adding 2^22, 2^23 and
// 2^24 rounds to multiples of 0.5, 1 and 2, ties to even, and the low bits of the sum count the multiples. The steps of
// the format are 0.5 up to 2, 1 up to 4 and 2 up to 6; its code is the minimum of the three counts (starting at 0, 2
// and 4) and 7, since the count of a finer step grows faster and that of a coarser one starts higher. NaN gives a large
// integer and so 7.
//
// To quantise bfloat16 at memory speed, an H100 can spend 11 integer instructions per element: this takes 3, and 3
// additions on the floating-point pipe.
constexpr int kMagnitudeBase = 0x4a800000;  // the bits of 2^22; those of 2^23 and 2^24 are 2^23 and 2^24 more

__device__ inline int e2m1_magnitude(float value) {
  const float size = fabsf(value);
  int code = __float_as_int(size + 0x1p22f);
  code = min(code, __float_as_int(size + 0x1p23f) - ((1 << 23) - 2));
  code = min(code, __float_as_int(size + 0x1p24f) - ((1 << 24) - 4));
  return min(code, kMagnitudeBase + 7);
}

#endif

// With ties toward zero: moves the midpoints whose even code is the upper one down a bit.
template <Ties ties>
__device__ inline float prepare_ties(float value) {
  if (ties == Ties::kToEven) return value;
  const float size = fabsf(value);
  return size == 0.75f || size == 1.75f || size == 3.5f ? value * 0.99f : value;
}

// The nearest codes of 8 values, saturated to +-6 (infinities too). The sign is kept, also of zeros. NaN gives +6, code
// 7. Values must be results of arithmetic, whose NaN is positive: the hardware drops the sign of a negative one, the
// software does not.
template <Ties ties = Ties::kToEven>
__device__ inline uint32_t encode_e2m1x8(const float (&values)[8]) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = prepare_ties<ties>(values[i]);
  uint32_t codes;
#if __CUDA_ARCH__ >= 1000
  asm("{\n"
      ".reg .b8 pair0, pair1, pair2, pair3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 pair0, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 pair1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 pair2, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 pair3, %8, %7;\n"
      "mov.b32 %0, {pair0, pair1, pair2, pair3};\n"
      "}"
      : "=r"(codes)
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
#else
  codes = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const uint32_t sign = __float_as_uint(v[i]) >> 28 & 8u;
    codes = codes * 16u + (static_cast<uint32_t>(e2m1_magnitude(v[i])) | sign);
  }
  codes -= static_cast<uint32_t>(kMagnitudeBase) * 0x11111111u;  // one at each nibble
#endif
  return codes;
}

// The value of the code in the low 4 bits: the code's bits are those of a float32 2^126 times smaller.
__device__ inline float decode_e2m1(uint32_t code) {
  return __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
}

}  // namespace dsv4
