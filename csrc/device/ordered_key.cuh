// Floats as integer keys in the order of a selection: the smaller the key, the better the value.
#pragma once

#include <cstdint>

namespace dsv4 {

constexpr uint32_t kNoKey = 0xffffffffu;   // absent; no value has this key
constexpr uint32_t kNanKey = 0xfffffffeu;  // any NaN: after every number, before absent

// Descending by value. -0 and +0 share a key: they are equal, so the column decides between them.
__device__ inline uint32_t descending_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 + 0 is +0
  const uint32_t key = bits ^ (~static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) & 0x7fffffffu);
  return isnan(value) ? kNanKey : key;
}

// The value of a key; of a shared key (key_is_shared()) one of its values.
__device__ inline float value_of_key(uint32_t key) {
  return __uint_as_float(static_cast<int32_t>(key) < 0 ? key : key ^ 0x7fffffffu);
}

// Whether values with different bits have this key: both zeros, and NaNs.
__device__ inline bool key_is_shared(uint32_t key) { return key == 0x7fffffffu || key == kNanKey; }

// A key and the column it was found in, as one number: among equal keys the lower column is the better entry. No two
// entries of a row are equal, so the result does not depend on the order in which they are processed.
__device__ inline uint64_t make_entry(uint32_t key, uint32_t column) { return uint64_t{key} << 32 | column; }
__device__ inline uint32_t entry_key(uint64_t entry) { return entry >> 32; }
__device__ inline uint32_t entry_column(uint64_t entry) { return static_cast<uint32_t>(entry); }

constexpr uint64_t kNoEntry = ~uint64_t{0};

}  // namespace dsv4
