// Division by a number that is constant during a launch, without a division instruction.
#pragma once

#include <cstdint>

namespace dsv4 {

// n / divisor for n below 2^31: a multiplication and a shift (Granlund and Montgomery, "Division by invariant integers
// using multiplication", PLDI 1994).
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor) {
    if (divisor == 0) return;  // an empty problem: nothing is divided
    while (uint64_t{1} << shift < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(multiplier, n) + n) >> shift; }
};

// The same for n of 0 to 2^63 - 1, and a divisor of 1 or more. multiplier is less than 2^64 / divisor by at most 1,
// so the high half of the product is the quotient or one less. The compiler's 64-bit division takes about a hundred
// dependent instructions.
struct LongDivisor {
  int64_t value = 1;
  uint64_t multiplier = UINT64_MAX;

  LongDivisor() = default;
  explicit LongDivisor(int64_t divisor) : value(divisor), multiplier(UINT64_MAX / static_cast<uint64_t>(divisor)) {}

  __device__ int64_t quotient(int64_t n) const {
    const int64_t low = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), multiplier));
    return low + (n - low * value >= value);
  }
};

}  // namespace dsv4
