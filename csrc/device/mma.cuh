// mma.sync m16n8k16 of bfloat16 with float32 sums, which every architecture that is built for has.
#pragma once

#include <cstdint>

namespace dsv4 {

// sums += a . b. With row = lane / 4 and q = lane % 4, a lane has of a, in this order: columns 2q and 2q + 1 of rows
// `row` and `row + 8`, then columns 2q + 8 and 2q + 9 of both; of b the same columns of token `row`; of the sums,
// tokens 2q and 2q + 1 of rows `row` and `row + 8`.
__device__ inline void multiply_add(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace dsv4
