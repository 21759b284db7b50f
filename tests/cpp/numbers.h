// Numbers as the library stores them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace engine {

inline double from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Exact for what has at most 8 significant bits, such as small integers.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// Element `index` of packed E2M1 codes, the even one in the low nibble.
inline double from_e2m1(const uint8_t* codes, int64_t index) {
  static constexpr double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int code = codes[index / 2] >> (index % 2 * 4) & 15;
  return code & 8 ? -kValues[code & 7] : kValues[code];
}

inline double from_e8m0(uint8_t code) { return std::ldexp(1.0, code - 127); }

}  // namespace engine
