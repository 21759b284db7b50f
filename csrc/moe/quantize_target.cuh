// Where a quantising kernel writes to, and how its threads share the work: one item is one chunk of a row, items lie
// row after row, and a grid of bounded size goes through them.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "device/divide.cuh"
#include "device/swizzle.cuh"
#include "moe/quantize_policy.h"
#include "moe/quantize_source.cuh"

namespace dsv4 {

struct Target {
  uint8_t* data;
  uint8_t* scale;
  const int32_t* n_used;  // null: all rows
  uint32_t rows;
  uint32_t columns;       // elements of a row
  uint32_t scales;        // of a row, without padding
  uint32_t column_tiles;  // of swizzled scales
  Divisor row_items;      // items of a row; with a swizzle, padded to whole tiles
  bool swizzle;

  __device__ int64_t scale_offset(uint32_t row, uint32_t column) const {
    return swizzle ? swizzled_offset(row, column, column_tiles) : static_cast<int64_t>(row) * scales + column;
  }

  // Where the codes of the elements from a column on lie.
  template <typename Codes>
  __device__ Codes* data_at(uint32_t row, uint32_t column, uint32_t codes_per_byte) const {
    return reinterpret_cast<Codes*>(data + (static_cast<int64_t>(row) * columns + column) / codes_per_byte);
  }

  // Rows that are quantised: those below n_used.
  __device__ uint32_t used_rows() const {
    return n_used ? static_cast<uint32_t>(min(max(*n_used, 0), static_cast<int32_t>(rows))) : rows;
  }

  // Rows whose scales are written: with a swizzle, whole tiles of them.
  __device__ uint32_t written_rows(uint32_t used) const {
    return swizzle ? (used + kSwizzleRows - 1) / kSwizzleRows * kSwizzleRows : used;
  }
};

// What an item is.
enum class Item {
  kChunk,    // values to encode
  kPadding,  // of a swizzled scale: a scale of 0, and no data
  kNothing,  // beyond the last one
};

// Calls function(row, column, item) for this thread's items; column is that of the first element. The lanes of a warp
// call it equally often and together, lane by lane for neighbouring items.
template <typename Function>
__device__ inline void for_each_item(const Target& target, Function&& function) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t used = target.used_rows();
  const uint32_t items = target.written_rows(used) * target.row_items.value;
  for (uint32_t base = blockIdx.x * kQuantizeThreads + threadIdx.x - lane; base < items;
       base += gridDim.x * kQuantizeThreads) {
    const uint32_t item = base + lane;
    const uint32_t row = target.row_items.quotient(item);
    const uint32_t column = (item - row * target.row_items.value) * kChunk;
    const bool inside = row < used && column < target.columns;
    function(row, column, item >= items ? Item::kNothing : inside ? Item::kChunk : Item::kPadding);
  }
}

// Codes and scales are bytes to whoever prefers that.
constexpr DtypeSet kFp4Dtypes = one_of(DSV4_UINT8, DSV4_FLOAT4_E2M1FN_X2);
constexpr DtypeSet kE4m3Dtypes = one_of(DSV4_UINT8, DSV4_FLOAT8_E4M3FN);
constexpr DtypeSet kE8m0Dtypes = one_of(DSV4_UINT8, DSV4_FLOAT8_E8M0FNU);

// The checks of the outputs of an op that makes blocks of `group` elements with a byte of scale each. codes_per_byte: 2
// for FP4.
template <typename Args>
void check_target(Check& check, const Args& args, int64_t group, int64_t codes_per_byte, DtypeSet data_dtypes,
                  DtypeSet scale_dtypes) {
  check.range("x rows", extent(args.x, 0), 0, INT32_MAX);
  check.range("x columns", extent(args.x, 1), 0, INT32_MAX);
  if (check.status()) return;
  const int64_t rows = extent(args.x, 0), columns = source_columns(args.x, args.source), scales = columns / group;
  const int64_t row_chunks = swizzled_columns(scales) * group / kChunk;
  check.range("x rows * columns, in 16s", swizzled_rows(rows) * row_chunks, 0, INT32_MAX);
  check.flag("swizzle", args.swizzle);
  if (present(args.n_used)) {
    if (args.n_used.rank == 0)
      check.tensor("n_used", args.n_used, one_of(DSV4_INT32), {});
    else
      check.tensor("n_used", args.n_used, one_of(DSV4_INT32), {1});
  }
  check.tensor("out", args.out, data_dtypes, {rows, columns / codes_per_byte});
  check.aligned_rows("out", args.out, kChunk / codes_per_byte);
  if (args.swizzle)
    check.tensor("out_scale", args.out_scale, scale_dtypes, {swizzled_rows(rows), swizzled_columns(scales)});
  else
    check.tensor("out_scale", args.out_scale, scale_dtypes, {rows, scales});
}

template <typename Args>
Target make_target(const Args& args, int64_t group) {
  const int64_t columns = source_columns(args.x, args.source), scales = columns / group;
  const int64_t row_items = (args.swizzle ? swizzled_columns(scales) : scales) * group / kChunk;
  Target target = {};
  target.data = static_cast<uint8_t*>(args.out.data);
  target.scale = static_cast<uint8_t*>(args.out_scale.data);
  target.n_used = static_cast<const int32_t*>(args.n_used.data);
  target.rows = static_cast<uint32_t>(extent(args.x, 0));
  target.columns = static_cast<uint32_t>(columns);
  target.scales = static_cast<uint32_t>(scales);
  target.column_tiles = static_cast<uint32_t>(swizzle_tiles_across(scales));
  target.row_items = Divisor(static_cast<uint32_t>(row_items));
  target.swizzle = args.swizzle != 0;
  return target;
}

inline int64_t elements(const dsv4_tensor& tensor) { return tensor.rank == 0 ? 1 : extent(tensor, 0); }

// The checks of global scales, and of the experts whose they are.
template <typename Args>
void check_global_scale(Check& check, const Args& args, int64_t rows) {
  check.optional_tensor("expert_ids", args.expert_ids, one_of(DSV4_INT32), {rows});
  if (args.global_scale.rank == 0)
    check.tensor("global_scale", args.global_scale, one_of(DSV4_FLOAT32), {});
  else
    check.tensor("global_scale", args.global_scale, one_of(DSV4_FLOAT32), {kAny});
  const int64_t count = elements(args.global_scale);
  if (present(args.expert_ids))
    check.range("global_scale elements", count, 1, INT32_MAX);
  else
    check.require(count == 1 || count == rows, "global_scale elements", "1, or as many as there are rows", count);
  check.flag("reciprocal_global_scale", args.reciprocal_global_scale);
}

inline uint32_t quantize_blocks(const LaunchTarget& launch_target, const Target& target) {
  const int64_t rows = target.swizzle ? swizzled_rows(target.rows) : target.rows;
  return quantize_blocks(*launch_target.device, rows * target.row_items.value);
}

}  // namespace dsv4
