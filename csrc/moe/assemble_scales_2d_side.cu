#include <dsv4/moe.h>

#include "moe/scale_tiles.cuh"

namespace dsv4 {

// Rows of the activations' scales, from their expert's rows without gaps to its padded section.
struct ExpertRows {
  const uint8_t* scales;
  const int32_t* expert_offsets;
  const int32_t* padded_offsets;
  int64_t rows;
  int64_t row_stride;
  int32_t experts;

  struct OfTile {
    const ExpertRows& all;
    int64_t first_row;  // of the padded rows
    int first_expert;   // of the first row

    // The expert whose section holds a row is the last one that starts at or before it; whatever the offsets are, only
    // rows of the input are named.
    __device__ const uint8_t* source(int row_in_tile) const {
      const int64_t row = first_row + row_in_tile;
      int expert = first_expert;
      while (expert + 1 < all.experts && all.padded_offsets[expert + 1] <= row) ++expert;
      const int64_t in_expert = row - all.padded_offsets[expert];
      const int64_t from = all.expert_offsets[expert] + in_expert;
      const bool holds =
          in_expert >= 0 && row < all.padded_offsets[expert + 1] && from < all.expert_offsets[expert + 1];
      return holds && from >= 0 && from < all.rows ? all.scales + from * all.row_stride : nullptr;
    }
  };

  // Sections start at multiples of 128 where a product reads them: then a tile has one expert, which the block finds by
  // counting the sections that start at or before it.
  __device__ OfTile of_tile(uint32_t tile_row) const {
    const int64_t row = static_cast<int64_t>(tile_row) * kSwizzleRows;
    int started = 0;
    for (int first = 0; first < experts; first += kScaleThreads) {
      const int expert = first + static_cast<int>(threadIdx.x);
      started += __syncthreads_count(expert < experts && padded_offsets[expert] <= row);
    }
    return {*this, row, max(started - 1, 0)};
  }
};

}  // namespace dsv4

extern "C" dsv4_status dsv4_assemble_scales_2d_side(const dsv4_assemble_scales_2d_side_args* given,
                                                    dsv4_stream stream) {
  using namespace dsv4;
  Check check("assemble_scales_2d_side");
  const dsv4_assemble_scales_2d_side_args args = check.read(given);
  const ScaleMatrices in = check_scale_matrices(check, "scales", args.scales, kScaleDtypes, 2);
  const int64_t offsets = extent(args.expert_offsets, 0);
  check.tensor("expert_offsets", args.expert_offsets, one_of(DSV4_INT32), {kAny});
  check.range("expert_offsets entries (experts + 1)", offsets, 2, INT32_MAX);
  check.tensor("padded_offsets", args.padded_offsets, one_of(DSV4_INT32), {offsets});
  check.range("padded_rows", args.padded_rows, 0, INT64_MAX);
  check.multiple("padded_rows", args.padded_rows, kSwizzleRows);
  check_swizzled(check, "out", args.out, same_dtype(check, args.scales), 2, 1, args.padded_rows, in.columns);
  const uint32_t blocks = scale_blocks(check, "out", swizzle_tiles_down(args.padded_rows), in.columns);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (blocks == 0) return DSV4_OK;
  const ExpertRows rows = {static_cast<const uint8_t*>(args.scales.data),
                           static_cast<const int32_t*>(args.expert_offsets.data),
                           static_cast<const int32_t*>(args.padded_offsets.data),
                           in.rows,
                           in.row_stride,
                           static_cast<int32_t>(offsets - 1)};
  return with_width(in.width, [&](auto width) {
    return launch<swizzle_scales_kernel<decltype(width)::value, ExpertRows>>(
        target, {blocks, kScaleThreads}, rows, static_cast<uint8_t*>(args.out.data), in.columns,
        blocks_for(in.columns, kColumnsOfBlock));
  });
}
