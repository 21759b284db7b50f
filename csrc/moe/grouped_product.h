// What the ops that multiply rows grouped by expert check alike. The kernels are in aot/moe.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "kernels.h"

namespace dsv4 {

constexpr int64_t kProductAlignment = 16;   // of the first element and of every row, as the kernels' vector loads need
constexpr int64_t kColumnStep = 16;         // what columns must be multiples of: a vector of results, twice
constexpr int64_t kInnerStep = 32;          // the same of inner: as many FP4 codes are 16 bytes
constexpr int64_t kInterleavedBlock = 128;  // inner positions that lie together in interleaved weights; the last block
                                            // may be padding in part
constexpr int64_t kInterleavedWords = kInterleavedBlock / 8;

enum Operands { kBfloat16Mxfp4, kBfloat16Nvfp4, kNvfp4, kMxfp8Mxfp4, kOperandsCount };

// As the aot kernels name them: of x, and the positions that share a scale of the weights.
constexpr Operands operands_of(std::string_view x_format, int32_t group) {
  return x_format == "bf16" ? (group == 16 ? kBfloat16Nvfp4 : kBfloat16Mxfp4)
                            : (x_format == "e2m1" ? kNvfp4 : kMxfp8Mxfp4);
}

constexpr int kTileSizes = 3;
constexpr int tile_size_index(int64_t rows) { return rows == 16 ? 0 : rows == 64 ? 1 : rows == 128 ? 2 : -1; }

// The aot kernels of one function, by operands, whether SwiGLU follows, and rows of a tile; null where there is none.
template <typename Kernel>
struct ProductKernels {
  const Kernel* of[kOperandsCount][2][kTileSizes];
};

// Sorted out by their constants: whatever the aot step compiles is found here.
template <typename Kernel, size_t Count>
constexpr ProductKernels<Kernel> product_kernels(const Kernel* const (&kernels)[Count]) {
  ProductKernels<Kernel> found = {};
  for (const Kernel* kernel : kernels) {
    const auto& is = kernel->constants[0];
    found.of[operands_of(is.x_format, is.group)][is.swiglu][tile_size_index(is.rows)] = kernel;
  }
  return found;
}

constexpr DtypeSet kPackedFp4 = one_of(DSV4_UINT8, DSV4_FLOAT4_E2M1FN_X2);
constexpr DtypeSet kE8m0Bytes = one_of(DSV4_UINT8, DSV4_FLOAT8_E8M0FNU);

// One product, as its arguments describe it.
struct GroupedProduct {
  Operands operands;
  bool interleaved;
  bool nvfp4_weights;
  int64_t x_rows, experts, inner, weight_rows;
  int64_t columns;  // of the result
  int64_t tiles, rows;
  int64_t tile_rows;
  int size;  // index of tile_rows: 16, 64 or 128
  int32_t alphas;
  float limit;  // infinity for none
};

// The checks of all that is read. x_dtypes: of weights that are not interleaved, which are bfloat16's alone.
template <typename Args>
GroupedProduct check_grouped_product(Check& check, const Args& args, DtypeSet x_dtypes, bool swiglu) {
  GroupedProduct product = {};
  const bool can_interleave = x_dtypes & one_of(DSV4_BFLOAT16);
  const bool interleaved = can_interleave && args.weight.rank == 4;
  const bool nvfp4_weights =
      interleaved ? extent(args.weight_scale, 3) == 4 : args.weight_scale.dtype == DSV4_FLOAT8_E4M3FN;
  const int64_t group = nvfp4_weights ? 16 : 32;
  const bool fp8 = args.x.dtype == DSV4_FLOAT8_E4M3FN;
  const Operands operands = args.x.dtype == DSV4_BFLOAT16 ? (nvfp4_weights ? kBfloat16Nvfp4 : kBfloat16Mxfp4)
                            : fp8                         ? kMxfp8Mxfp4
                                                          : kNvfp4;
  const int64_t x_rows = extent(args.x, 0);
  const int64_t experts = extent(args.weight, 0);
  const int64_t blocks = interleaved ? std::min<int64_t>(extent(args.weight, 1), INT32_MAX) : 0;
  const int64_t inner = interleaved ? extent(args.x, 1) : saturating_product(extent(args.weight, 2), 2);
  const int64_t weight_rows = extent(args.weight, interleaved ? 2 : 1);
  const int64_t inner_step = interleaved ? group : kInnerStep;
  const int64_t row_step = swiglu ? 2 * kColumnStep : kColumnStep;
  const int64_t tiles = extent(args.tile_to_expert, 0);
  const int64_t rows = extent(args.row_to_slot, 0);

  if (interleaved) {
    check.tensor("x", args.x, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
    check.tensor("weight", args.weight, one_of(DSV4_INT32), {kAny, kAny, kAny, kInterleavedWords});
    check.tensor("weight_scale", args.weight_scale, one_of(DSV4_INT32),
                 {experts, blocks, weight_rows, nvfp4_weights ? 4 : 2});
    check.range("weight inner blocks", blocks, 1, INT32_MAX / 2 / kInterleavedBlock);
    check.range("x columns", inner, (blocks - 1) * kInterleavedBlock + 1, blocks * kInterleavedBlock);
    check.multiple("x columns", inner, inner_step);
  } else {
    check.tensor("x", args.x, x_dtypes, {kAny, kAny}, Layout::kStridedRows);
    check.tensor("weight", args.weight, kPackedFp4, {kAny, kAny, kAny});
    check.tensor("weight_scale", args.weight_scale, kE8m0Bytes | one_of(DSV4_FLOAT8_E4M3FN),
                 {experts, weight_rows, inner / group});
  }
  check.range("x rows", x_rows, 0, INT32_MAX);
  check.range("weight experts", experts, 1, INT32_MAX);
  check.range("weight inner size", inner, inner_step, INT32_MAX / 2);
  check.multiple("weight inner size", inner, inner_step);
  check.range("weight rows", weight_rows, row_step, INT32_MAX / 2);
  check.multiple("weight rows", weight_rows, row_step);
  const int64_t x_columns = operands == kNvfp4 ? inner / 2 : inner;
  check.range("x columns", extent(args.x, 1), x_columns, x_columns);
  if (operands == kNvfp4) {
    check.tensor("weight_scale", args.weight_scale, one_of(DSV4_FLOAT8_E4M3FN), {experts, weight_rows, inner / 16});
    check.tensor("x_scale", args.x_scale, one_of(DSV4_FLOAT8_E4M3FN), {x_rows, inner / 16});
  } else if (operands == kMxfp8Mxfp4) {
    check.tensor("weight_scale", args.weight_scale, kE8m0Bytes, {experts, weight_rows, inner / 32});
    check.tensor("x_scale", args.x_scale, kE8m0Bytes, {x_rows, inner / 32});
  } else {
    check.absent("x_scale", args.x_scale, "when x is bfloat16");
  }
  check.tensor("tile_to_expert", args.tile_to_expert, one_of(DSV4_INT32), {kAny});
  check.tensor("row_to_slot", args.row_to_slot, one_of(DSV4_INT32), {kAny});
  const int64_t tile_size = tiles ? rows / tiles : 16;
  const int size = tiles * tile_size == rows ? tile_size_index(tile_size) : -1;
  if (operands == kMxfp8Mxfp4)
    check.require(size == 0 || size == 2, "row_to_slot", "16 or 128 rows per tile (MXFP8 x)", rows);
  else
    check.require(size >= 0, "row_to_slot", "16, 64 or 128 rows per tile", rows);
  check.range("top_k", args.top_k, 0, DSV4_MAX_TOP_K);
  if (args.alpha.rank == 2)
    check.optional_tensor("alpha", args.alpha, one_of(DSV4_FLOAT32), {experts, swiglu ? 2 : 1});
  else
    check.optional_tensor("alpha", args.alpha, one_of(DSV4_FLOAT32), {experts});
  check.optional_tensor("slot_weights", args.slot_weights, one_of(DSV4_FLOAT32), {x_rows, args.top_k});
  if (present(args.slot_weights)) check.range("top_k", args.top_k, 1, DSV4_MAX_TOP_K);
  check.number("limit", args.limit, 0.0f);
  for (const auto& [name, tensor] : {std::pair<const char*, const dsv4_tensor&>{"x", args.x},
                                     {"weight", args.weight},
                                     {"weight_scale", args.weight_scale}})
    check.aligned_rows(name, tensor, kProductAlignment);
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(args.x_scale.data) % kProductAlignment;
  check.require(misaligned == 0, "x_scale", "an address that is a multiple of 16", misaligned);

  const int64_t alphas = args.alpha.rank == 2 ? extent(args.alpha, 1) : 1;
  product.operands = operands;
  product.interleaved = interleaved;
  product.nvfp4_weights = nvfp4_weights;
  product.x_rows = x_rows;
  product.experts = experts;
  product.inner = inner;
  product.weight_rows = weight_rows;
  product.columns = swiglu ? weight_rows / 2 : weight_rows;
  product.tiles = tiles;
  product.rows = rows;
  product.tile_rows = tile_size;
  product.size = size;
  product.alphas = present(args.alpha) ? static_cast<int32_t>(alphas) : 0;
  product.limit = args.limit > 0 ? args.limit : INFINITY;
  return product;
}

// Fails unless a grid of so many blocks can be launched.
inline dsv4_status check_product_blocks(const char* op, int64_t blocks) {
  if (blocks <= INT32_MAX) return DSV4_OK;
  return fail(DSV4_ERROR_INVALID_ARGUMENT, op, "tile_to_expert",
              "expected at most %d tiles times blocks of columns, got %lld", INT32_MAX, static_cast<long long>(blocks));
}

}  // namespace dsv4
