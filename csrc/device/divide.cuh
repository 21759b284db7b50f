// Division by a number that only the host knows, without a division instruction.
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
    if (divisor == 0) return;  // of nothing: there is nothing to divide
    while (uint64_t{1} << shift < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(multiplier, n) + n) >> shift; }
};

}  // namespace dsv4
