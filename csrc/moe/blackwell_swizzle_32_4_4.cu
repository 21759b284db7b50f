#include <dsv4/moe.h>

#include "moe/scale_tiles.cuh"

namespace dsv4 {

// Rows of matrices in row-major order.
struct MatrixRows {
  const uint8_t* scales;
  int64_t rows;
  int64_t row_stride;
  int64_t matrix_stride;
  uint32_t tiles_down;  // of one matrix

  struct OfTile {
    const uint8_t* first;
    int64_t rows;  // from the first one on
    int64_t row_stride;

    __device__ const uint8_t* source(int row_in_tile) const {
      return row_in_tile < rows ? first + row_in_tile * row_stride : nullptr;
    }
  };

  __device__ OfTile of_tile(uint32_t tile_row) const {
    const uint32_t matrix = tile_row / tiles_down;
    const int64_t row = static_cast<int64_t>(tile_row - matrix * tiles_down) * kSwizzleRows;
    return {scales + matrix * matrix_stride + row * row_stride, rows - row, row_stride};
  }
};

}  // namespace dsv4

extern "C" dsv4_status dsv4_blackwell_swizzle_32_4_4(const dsv4_blackwell_swizzle_32_4_4_args* given,
                                                     dsv4_stream stream) {
  using namespace dsv4;
  Check check("blackwell_swizzle_32_4_4");
  const dsv4_blackwell_swizzle_32_4_4_args args = check.read(given);
  const ScaleMatrices in = check_scale_matrices(check, "scales", args.scales, kScaleDtypes, args.scales.rank);
  check_swizzled(check, "out", args.out, same_dtype(check, args.scales), args.scales.rank, in.matrices, in.rows,
                 in.columns);
  const int64_t tiles_down = swizzle_tiles_down(in.rows);
  const uint32_t blocks = scale_blocks(check, "scales", in.matrices * tiles_down, in.columns);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (blocks == 0) return DSV4_OK;
  const MatrixRows rows = {static_cast<const uint8_t*>(args.scales.data), in.rows, in.row_stride, in.matrix_stride,
                           static_cast<uint32_t>(tiles_down)};
  return with_width(in.width, [&](auto width) {
    return launch<swizzle_scales_kernel<decltype(width)::value, MatrixRows>>(
        target, {blocks, kScaleThreads}, rows, static_cast<uint8_t*>(args.out.data), in.columns,
        blocks_for(in.columns, kColumnsOfBlock));
  });
}
