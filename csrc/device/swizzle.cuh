// The 32_4_4 layout of block scales, which the block-scaled tensor core instructions of Blackwell read.
//
// A matrix of one-byte scales [rows, columns], one column per group along K, is cut into tiles of 128 x 4, stored
// one after another along the columns. Inside its 512 bytes, a tile is 32 x 4 x 4: the row modulo 32, which of the four
// 32-row quarters, the column. Rows are padded to 128 and columns to 4 with zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dsv4 {

constexpr int kSwizzleRows = 128;  // per tile
constexpr int kSwizzleColumns = 4;
constexpr int kSwizzleTile = kSwizzleRows * kSwizzleColumns;  // bytes
constexpr int kSwizzleQuarter = 32;                           // rows
constexpr int kSwizzleChunk = 16;  // bytes of a tile that rows r, r + 32, r + 64 and r + 96 share

__host__ __device__ inline int64_t swizzle_tiles_down(int64_t rows) { return (rows + kSwizzleRows - 1) / kSwizzleRows; }

__host__ __device__ inline int64_t swizzle_tiles_across(int64_t columns) {
  return (columns + kSwizzleColumns - 1) / kSwizzleColumns;
}

__host__ __device__ inline int64_t swizzled_rows(int64_t rows) { return swizzle_tiles_down(rows) * kSwizzleRows; }

__host__ __device__ inline int64_t swizzled_columns(int64_t columns) {
  return swizzle_tiles_across(columns) * kSwizzleColumns;
}

// Bytes from the start of the swizzled matrix to the scale of a row and column.
__host__ __device__ inline int64_t swizzled_offset(int64_t row, int64_t column, int64_t tiles_across) {
  const int64_t tile = row / kSwizzleRows * tiles_across + column / kSwizzleColumns;
  const int in_tile = static_cast<int>(row % kSwizzleRows);
  return tile * kSwizzleTile + in_tile % kSwizzleQuarter * kSwizzleChunk + in_tile / kSwizzleQuarter * kSwizzleColumns +
         column % kSwizzleColumns;
}

// The same for 32-bit indices, in a fifth of the instructions: kernels compute one for every few elements.
__device__ inline int64_t swizzled_offset(uint32_t row, uint32_t column, uint32_t tiles_across) {
  const int64_t tile = static_cast<int64_t>(row / kSwizzleRows) * tiles_across + column / kSwizzleColumns;
  return tile * kSwizzleTile + (row % kSwizzleQuarter * kSwizzleChunk +
                                row % kSwizzleRows / kSwizzleQuarter * kSwizzleColumns + column % kSwizzleColumns);
}

}  // namespace dsv4
