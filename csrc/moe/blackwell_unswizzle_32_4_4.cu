#include <dsv4/moe.h>

#include "moe/scale_tiles.cuh"

namespace dsv4 {

template <int Width>
__global__ void __launch_bounds__(kScaleThreads)
    unswizzle_scales_kernel(const uint8_t* __restrict__ swizzled, uint8_t* __restrict__ scales, int64_t rows,
                            int64_t columns, int64_t row_stride, int64_t matrix_stride, uint32_t tiles_down,
                            uint32_t column_blocks) {
  await_previous_grid();
  const ScalePosition at = scale_position(column_blocks);
  if (at.first_column >= columns) return;
  const int64_t tiles_across = swizzle_tiles_across(columns);
  const int64_t first_tile = at.first_column / kSwizzleColumns;
  const uint8_t* const in =
      swizzled + (at.tile_row * tiles_across + first_tile) * kSwizzleTile + at.row_in_quarter * kSwizzleChunk;
  Chunk loaded[kTilesOfThread];
#pragma unroll
  for (int tile = 0; tile < kTilesOfThread; ++tile) {
    loaded[tile] = {};
    if (first_tile + tile < tiles_across) loaded[tile] = *reinterpret_cast<const Chunk*>(in + tile * kSwizzleTile);
  }
  const uint32_t matrix = at.tile_row / tiles_down;
  const int64_t first_row = static_cast<int64_t>(at.tile_row - matrix * tiles_down) * kSwizzleRows + at.row_in_quarter;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int64_t row = first_row + quarter * kSwizzleQuarter;
    if (row < rows)
      store_columns<Width>(scales + matrix * matrix_stride + row * row_stride, at.first_column, columns,
                           transpose(loaded, quarter));
  }
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_blackwell_unswizzle_32_4_4(const dsv4_blackwell_unswizzle_32_4_4_args* given,
                                                       dsv4_stream stream) {
  using namespace dsv4;
  Check check("blackwell_unswizzle_32_4_4");
  const dsv4_blackwell_unswizzle_32_4_4_args args = check.read(given);
  const int32_t rank = args.swizzled.rank;
  check.range("rows", args.rows, 0, INT32_MAX);
  check.range("columns", args.columns, 0, INT32_MAX);
  check_swizzled(check, "swizzled", args.swizzled, kScaleDtypes, rank, kAny, args.rows, args.columns);
  const ScaleMatrices out =
      check_scale_matrices(check, "out", args.out, same_dtype(check, args.swizzled), rank,
                           rank == 3 ? extent(args.swizzled, 0) : int64_t{1}, args.rows, args.columns);
  const int64_t tiles_down = swizzle_tiles_down(out.rows);
  const uint32_t blocks = scale_blocks(check, "out", out.matrices * tiles_down, out.columns);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (blocks == 0) return DSV4_OK;
  return with_width(out.width, [&](auto width) {
    return launch<unswizzle_scales_kernel<decltype(width)::value>>(
        target, {blocks, kScaleThreads}, static_cast<const uint8_t*>(args.swizzled.data),
        static_cast<uint8_t*>(args.out.data), out.rows, out.columns, out.row_stride, out.matrix_stride,
        static_cast<uint32_t>(tiles_down), blocks_for(out.columns, kColumnsOfBlock));
  });
}
