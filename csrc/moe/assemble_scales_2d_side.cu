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

  // The expert whose section holds a row is the last one that starts at or before it; whatever the offsets are, only
  // rows of the input are named.
  __device__ const uint8_t* source(uint32_t tile_row, int row_in_tile) const {
    const int64_t row = static_cast<int64_t>(tile_row) * kSwizzleRows + row_in_tile;
    int low = 0, high = experts;  // padded_offsets[low] <= row, if any is
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (padded_offsets[middle] <= row)
        low = middle;
      else
        high = middle;
    }
    const int64_t in_expert = row - padded_offsets[low];
    const int64_t from = expert_offsets[low] + in_expert;
    const bool holds = in_expert >= 0 && row < padded_offsets[low + 1] && from < expert_offsets[low + 1];
    return holds && from >= 0 && from < rows ? scales + from * row_stride : nullptr;
  }
};

}  // namespace dsv4

extern "C" dsv4_status dsv4_assemble_scales_2d_side(const dsv4_assemble_scales_2d_side_args* given,
                                                    dsv4_stream stream) {
  using namespace dsv4;
  Check check("assemble_scales_2d_side");
  const dsv4_assemble_scales_2d_side_args args = check.read(given);
  const ScaleMatrices in = check_scale_matrices(check, "scales", args.scales);
  check.range("scales rank", args.scales.rank, 2, 2);
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
