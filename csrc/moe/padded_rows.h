// What the ops over partly used rows check and choose alike. Their kernels are in aot/moe.
#pragma once

#include <dsv4/moe.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/launch.h"
#include "device/swizzle.cuh"

namespace dsv4 {

constexpr int64_t kVector = 16;   // what the arguments of aligned kernels are multiples of: elements, and bytes
constexpr int64_t kMxGroup = 32;  // values that share a scale

// Rows and columns of a kernel's tile, and the blocks of its grid, at most, for each multiprocessor: several times what
// it holds, so that the hardware balances them, and few enough to be gone at once where n_used is small.
struct PaddedTile {
  int64_t rows, columns;
  int64_t blocks_per_multiprocessor;
};

inline void check_padding(Check& check, int64_t rows, const dsv4_tensor& permutation_map, const dsv4_tensor& n_used) {
  check.tensor("permutation_map", permutation_map, one_of(DSV4_INT32), {rows});
  if (n_used.rank == 0)
    check.tensor("n_used", n_used, one_of(DSV4_INT32), {});
  else
    check.tensor("n_used", n_used, one_of(DSV4_INT32), {1});
}

// The clamp of SwiGLU as its kernels take it.
inline float check_limit(Check& check, float limit) {
  check.number("limit", limit, 0.0f);
  return limit == 0.0f ? INFINITY : limit;
}

// Kernels count rows in 32 bits, and look as many rows ahead as the grid has in it.
inline void check_extents(Check& check, int64_t rows, int64_t columns) {
  check.range("x rows", rows, 0, INT32_MAX - (1 << 21));
  check.range("x columns", columns, 0, INT32_MAX / 2);
}

// MXFP8 of [rows, columns]: data without gaps, and scales in the 32_4_4 layout, both on a multiple of 16 bytes.
inline void check_mxfp8(Check& check, int64_t rows, int64_t columns, const dsv4_tensor& data,
                        const dsv4_tensor& scale) {
  if (check.status()) return;  // else the extents are in range, and their products too
  const int64_t words = swizzled_rows(rows) * swizzled_columns(columns / kMxGroup) / 4;
  check.require(words <= INT32_MAX / 2, "x", "at most 2^32 groups of 32 columns", 4 * words);
  check.tensor("out_data", data, one_of(DSV4_UINT8, DSV4_FLOAT8_E4M3FN), {rows, columns});
  check.tensor("out_scale", scale, one_of(DSV4_UINT8, DSV4_FLOAT8_E8M0FNU),
               {swizzled_rows(rows), swizzled_columns(columns / kMxGroup)});
  check.aligned_rows("out_data", data, kVector);
  check.require(reinterpret_cast<uintptr_t>(scale.data) % kVector == 0, "out_scale", "data on a multiple of 16 bytes",
                reinterpret_cast<uintptr_t>(scale.data) % kVector);
}

// Columns on axis 0, groups of rows on axis 1; the same whatever n_used is.
inline dim3 padded_grid(const LaunchTarget& target, int64_t rows, int64_t columns, const PaddedTile& tile) {
  constexpr int64_t kMaxGridY = 65535;
  const uint32_t across = blocks_for(columns, tile.columns);
  const int64_t most = int64_t{target.device->multiprocessors} * tile.blocks_per_multiprocessor / across;
  const int64_t down = std::clamp<int64_t>(most, 1, kMaxGridY);
  return dim3(across, static_cast<uint32_t>(std::min<int64_t>(blocks_for(rows, tile.rows), down)));
}

// Whether a kernel may read and write 16 bytes at a time.
inline bool is_aligned(const dsv4_tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % kVector == 0 && tensor.stride[0] % kVector == 0 &&
         tensor.shape[1] % kVector == 0;
}

}  // namespace dsv4
