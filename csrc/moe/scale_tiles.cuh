// What the kernels that move scales into or out of the 32_4_4 layout have in common.
//
// A thread has 16 columns of the rows r, r + 32, r + 64 and r + 96: the 16-byte chunk that these rows share in each of
// four tiles. So both sides are read and written 16 bytes at a time, and what lies between them is a transposition of
// 4 x 4 words in registers. A warp takes 8 such rows x 64 columns: 128 bytes in a row of each tile, 64 of a matrix row.
#pragma once

#include "core/check.h"
#include "core/launch.h"
#include "device/swizzle.cuh"

namespace dsv4 {

constexpr int kTilesOfThread = 4;
constexpr int kColumnsOfThread = kTilesOfThread * kSwizzleColumns;
constexpr int kThreadsAcross = 4;  // of a warp
constexpr int kWarpRows = 32 / kThreadsAcross;
constexpr int kWarpsDown = kSwizzleQuarter / kWarpRows;  // of a block
constexpr int kWarpsAcross = 2;
constexpr int kScaleThreads = 32 * kWarpsDown * kWarpsAcross;
constexpr int kColumnsOfBlock = kColumnsOfThread * kThreadsAcross * kWarpsAcross;

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Where a thread works. The grid is one-dimensional: column blocks, then tiles down.
struct ScalePosition {
  uint32_t tile_row;   // counted through all matrices
  int row_in_quarter;  // of the first of the thread's four rows
  int64_t first_column;
};

__device__ inline ScalePosition scale_position(uint32_t column_blocks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t tile_row = blockIdx.x / column_blocks;
  const int64_t column_block = blockIdx.x - tile_row * column_blocks;
  const int across = warp / kWarpsDown * kThreadsAcross + lane % kThreadsAcross;
  return {tile_row, warp % kWarpsDown * kWarpRows + lane / kThreadsAcross,
          column_block * kColumnsOfBlock + across * kColumnsOfThread};
}

__device__ inline Chunk transpose(const Chunk (&from)[4], int column) {
  return {from[0].words[column], from[1].words[column], from[2].words[column], from[3].words[column]};
}

// 16 columns of a row, zero beyond its end. Width: bytes that rows start on and consist of a multiple of.
template <int Width>
__device__ inline Chunk load_columns(const uint8_t* row, int64_t column, int64_t columns) {
  Chunk chunk = {};
  if constexpr (Width == 16) {
    if (column < columns) chunk = *reinterpret_cast<const Chunk*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Width == 4) {
        if (column + 4 * i < columns) chunk.words[i] = *reinterpret_cast<const uint32_t*>(row + column + 4 * i);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (column + 4 * i + j < columns) chunk.words[i] |= uint32_t{row[column + 4 * i + j]} << 8 * j;
      }
    }
  }
  return chunk;
}

template <int Width>
__device__ inline void store_columns(uint8_t* row, int64_t column, int64_t columns, const Chunk& chunk) {
  if constexpr (Width == 16) {
    if (column < columns) *reinterpret_cast<Chunk*>(row + column) = chunk;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Width == 4) {
        if (column + 4 * i < columns) *reinterpret_cast<uint32_t*>(row + column + 4 * i) = chunk.words[i];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (column + 4 * i + j < columns) row[column + 4 * i + j] = static_cast<uint8_t>(chunk.words[i] >> 8 * j);
      }
    }
  }
}

// Swizzles the rows that `Rows` names: of_tile(tile_row), called by whole blocks, gives something whose
// source(row_in_tile) is where a row of the result starts, or null for zeros.
template <int Width, typename Rows>
__global__ void __launch_bounds__(kScaleThreads)
    swizzle_scales_kernel(Rows rows, uint8_t* __restrict__ swizzled, int64_t columns, uint32_t column_blocks) {
  await_previous_grid();
  const ScalePosition at = scale_position(column_blocks);
  const int64_t tiles_across = swizzle_tiles_across(columns);
  const auto tile_rows = rows.of_tile(at.tile_row);
  Chunk loaded[4];
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const uint8_t* const row = tile_rows.source(quarter * kSwizzleQuarter + at.row_in_quarter);
    loaded[quarter] = {};
    if (row) loaded[quarter] = load_columns<Width>(row, at.first_column, columns);
  }
  const int64_t first_tile = at.first_column / kSwizzleColumns;
  uint8_t* const out =
      swizzled + (at.tile_row * tiles_across + first_tile) * kSwizzleTile + at.row_in_quarter * kSwizzleChunk;
#pragma unroll
  for (int tile = 0; tile < kTilesOfThread; ++tile)
    if (first_tile + tile < tiles_across)
      *reinterpret_cast<Chunk*>(out + tile * kSwizzleTile) = transpose(loaded, tile);
}

constexpr DtypeSet kScaleDtypes = one_of(DSV4_UINT8, DSV4_FLOAT8_E4M3FN, DSV4_FLOAT8_E8M0FNU);

// The dtype of a tensor that has passed its checks, as the only one allowed.
inline DtypeSet same_dtype(const Check& check, const dsv4_tensor& checked) {
  return check.status() ? kScaleDtypes : DtypeSet{1} << checked.dtype;
}

// The swizzled side: contiguous, [(matrices,) swizzled rows, swizzled columns], on a multiple of 16 bytes.
inline void check_swizzled(Check& check, const char* name, const dsv4_tensor& value, DtypeSet dtypes, int32_t rank,
                           int64_t matrices, int64_t rows, int64_t columns) {
  if (rank == 3)
    check.tensor(name, value, dtypes, {matrices, swizzled_rows(rows), swizzled_columns(columns)});
  else
    check.tensor(name, value, dtypes, {swizzled_rows(rows), swizzled_columns(columns)});
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(value.data) % sizeof(Chunk));
  check.require(!misaligned, name, "data on a multiple of 16 bytes", misaligned);
}

// The side in row-major order: [(matrices,) rows, columns], of which rows may lie apart.
struct ScaleMatrices {
  int64_t matrices, rows, columns;
  int64_t row_stride, matrix_stride;
  int width;  // bytes of the widest accesses that every row allows: 16, 4 or 1
};

inline ScaleMatrices check_scale_matrices(Check& check, const char* name, const dsv4_tensor& value, DtypeSet dtypes,
                                          int32_t rank, int64_t matrices = kAny, int64_t rows = kAny,
                                          int64_t columns = kAny) {
  const bool batched = rank == 3;
  if (batched)
    check.tensor(name, value, dtypes, {matrices, rows, columns}, Layout::kStridedRows);
  else
    check.tensor(name, value, dtypes, {rows, columns}, Layout::kStridedRows);
  ScaleMatrices is = {};
  if (check.status()) return is;
  is.matrices = batched ? value.shape[0] : 1;
  is.rows = value.shape[batched];
  is.columns = value.shape[batched + 1];
  is.row_stride = value.stride[batched];
  is.matrix_stride = batched ? value.stride[0] : 0;
  const auto allows = [&](int64_t width) {
    return reinterpret_cast<uintptr_t>(value.data) % static_cast<uintptr_t>(width) == 0 && is.columns % width == 0 &&
           (is.rows <= 1 || is.row_stride % width == 0) && (is.matrices <= 1 || is.matrix_stride % width == 0);
  };
  is.width = allows(16) ? 16 : allows(4) ? 4 : 1;
  return is;
}

// Blocks for this many tiles down; 0, with an error, if there are too many.
inline uint32_t scale_blocks(Check& check, const char* name, int64_t tiles_down, int64_t columns) {
  const int64_t blocks = tiles_down * blocks_for(columns, kColumnsOfBlock);
  check.require(blocks <= INT32_MAX, name, "at most 2^31 - 1 blocks of 128 x 128 scales", blocks);
  return check.status() ? 0 : static_cast<uint32_t>(blocks);
}

// Calls function with the width as an integral constant.
template <typename Function>
dsv4_status with_width(int width, Function&& function) {
  if (width == 16) return function(std::integral_constant<int, 16>{});
  if (width == 4) return function(std::integral_constant<int, 4>{});
  return function(std::integral_constant<int, 1>{});
}

}  // namespace dsv4
