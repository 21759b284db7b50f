#include <dsv4/moe.h>

#include <cmath>
#include <utility>

#include "core/check.h"
#include "kernels.h"

namespace dsv4 {
namespace {

constexpr int64_t kAlignment = 16;  // of the first element and of every row, as the kernels' vector loads need
constexpr int64_t kStep = 64;       // what columns and inner must be multiples of
constexpr int64_t kBlock = 128;     // the same of interleaved weights, whose inner positions lie together by as many
constexpr int64_t kWords = kBlock / 8;

using Launch = decltype(&aot::moe_gemm_bf16_mxfp4_plain_16);

// One aot kernel: its function, and the columns of a block (aot/moe/moe_grouped_gemm.py).
struct Choice {
  Launch launch;
  int32_t columns;
};

enum Operands { kBfloat16Mxfp4, kBfloat16Nvfp4, kNvfp4, kMxfp8Mxfp4, kOperandsCount };

// By operands, whether SwiGLU follows, and rows of a tile: 16, 64, 128.
constexpr Choice kChoices[kOperandsCount][2][3] = {
    {{{aot::moe_gemm_bf16_mxfp4_plain_16, 128},
      {aot::moe_gemm_bf16_mxfp4_plain_64, 64},
      {aot::moe_gemm_bf16_mxfp4_plain_128, 128}},
     {{aot::moe_gemm_bf16_mxfp4_swiglu_16, 64},
      {aot::moe_gemm_bf16_mxfp4_swiglu_64, 64},
      {aot::moe_gemm_bf16_mxfp4_swiglu_128, 64}}},
    {{{aot::moe_gemm_bf16_nvfp4_plain_16, 64},
      {aot::moe_gemm_bf16_nvfp4_plain_64, 64},
      {aot::moe_gemm_bf16_nvfp4_plain_128, 128}},
     {{aot::moe_gemm_bf16_nvfp4_swiglu_16, 64},
      {aot::moe_gemm_bf16_nvfp4_swiglu_64, 64},
      {aot::moe_gemm_bf16_nvfp4_swiglu_128, 64}}},
    {{{aot::moe_gemm_e2m1_nvfp4_plain_16, 128},
      {aot::moe_gemm_e2m1_nvfp4_plain_64, 128},
      {aot::moe_gemm_e2m1_nvfp4_plain_128, 64}},
     {{aot::moe_gemm_e2m1_nvfp4_swiglu_16, 128},
      {aot::moe_gemm_e2m1_nvfp4_swiglu_64, 128},
      {aot::moe_gemm_e2m1_nvfp4_swiglu_128, 64}}},
    {{{aot::moe_gemm_e4m3_mxfp4_plain_16, 128}, {nullptr, 0}, {aot::moe_gemm_e4m3_mxfp4_plain_128, 64}},
     {{aot::moe_gemm_e4m3_mxfp4_swiglu_16, 128}, {nullptr, 0}, {aot::moe_gemm_e4m3_mxfp4_swiglu_128, 64}}},
};

using InterleavedLaunch = decltype(&aot::moe_gemm_interleaved_mxfp4_plain_16);

struct InterleavedChoice {
  InterleavedLaunch launch;
  int32_t weight_rows;  // of a block
};

// By weights (MXFP4, NVFP4), whether SwiGLU follows, and rows of a tile.
constexpr InterleavedChoice kInterleavedChoices[2][2][3] = {
    {{{aot::moe_gemm_interleaved_mxfp4_plain_16, 64},
      {aot::moe_gemm_interleaved_mxfp4_plain_64, 128},
      {aot::moe_gemm_interleaved_mxfp4_plain_128, 256}},
     {{aot::moe_gemm_interleaved_mxfp4_swiglu_16, 64},
      {aot::moe_gemm_interleaved_mxfp4_swiglu_64, 128},
      {aot::moe_gemm_interleaved_mxfp4_swiglu_128, 256}}},
    {{{aot::moe_gemm_interleaved_nvfp4_plain_16, 64},
      {aot::moe_gemm_interleaved_nvfp4_plain_64, 128},
      {aot::moe_gemm_interleaved_nvfp4_plain_128, 256}},
     {{aot::moe_gemm_interleaved_nvfp4_swiglu_16, 64},
      {aot::moe_gemm_interleaved_nvfp4_swiglu_64, 128},
      {aot::moe_gemm_interleaved_nvfp4_swiglu_128, 256}}},
};

constexpr DtypeSet kFp4 = one_of(DSV4_UINT8, DSV4_FLOAT4_E2M1FN_X2);
constexpr DtypeSet kE8m0 = one_of(DSV4_UINT8, DSV4_FLOAT8_E8M0FNU);

int size_index(int64_t rows) { return rows == 16 ? 0 : rows == 64 ? 1 : rows == 128 ? 2 : -1; }

}  // namespace
}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_grouped_gemm(const dsv4_moe_grouped_gemm_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_grouped_gemm");
  const dsv4_moe_grouped_gemm_args args = check.read(given);
  const bool interleaved = args.weight.rank == 4;
  const bool nvfp4_weights =
      interleaved ? extent(args.weight_scale, 3) == 4 : args.weight_scale.dtype == DSV4_FLOAT8_E4M3FN;
  const int64_t group = nvfp4_weights ? 16 : 32;
  const bool bfloat16 = args.x.dtype == DSV4_BFLOAT16;
  const bool fp8 = args.x.dtype == DSV4_FLOAT8_E4M3FN;
  const Operands operands = bfloat16 ? (nvfp4_weights ? kBfloat16Nvfp4 : kBfloat16Mxfp4) : fp8 ? kMxfp8Mxfp4 : kNvfp4;
  const int64_t x_rows = extent(args.x, 0);
  const int64_t experts = extent(args.weight, 0);
  const int64_t inner = interleaved ? extent(args.weight, 1) * kBlock : extent(args.weight, 2) * 2;
  const int64_t weight_rows = extent(args.weight, interleaved ? 2 : 1);
  const int64_t step = interleaved ? kBlock : kStep;
  const int64_t tiles = extent(args.tile_to_expert, 0);
  const int64_t rows = extent(args.row_to_slot, 0);
  const int64_t alphas = args.alpha.rank == 2 ? extent(args.alpha, 1) : 1;

  if (interleaved) {
    check.tensor("x", args.x, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
    check.tensor("weight", args.weight, one_of(DSV4_INT32), {kAny, kAny, kAny, kWords});
    check.tensor("weight_scale", args.weight_scale, one_of(DSV4_INT32),
                 {experts, inner / kBlock, weight_rows, nvfp4_weights ? 4 : 2});
  } else {
    check.tensor("x", args.x, one_of(DSV4_BFLOAT16, DSV4_FLOAT8_E4M3FN) | kFp4, {kAny, kAny}, Layout::kStridedRows);
    check.tensor("weight", args.weight, kFp4, {kAny, kAny, kAny});
    check.tensor("weight_scale", args.weight_scale, kE8m0 | one_of(DSV4_FLOAT8_E4M3FN),
                 {experts, weight_rows, inner / group});
  }
  check.range("x rows", x_rows, 0, INT32_MAX);
  check.range("weight experts", experts, 1, INT32_MAX);
  check.range("weight inner size", inner, step, INT32_MAX / 2);
  check.multiple("weight inner size", inner, step);
  check.flag("swiglu", args.swiglu);
  const int64_t columns = args.swiglu ? weight_rows / 2 : weight_rows;
  check.range("weight rows", weight_rows, step, INT32_MAX / 2);
  check.multiple("weight rows", weight_rows, args.swiglu ? 2 * kStep : step);
  check.range("x columns", extent(args.x, 1), operands == kNvfp4 ? inner / 2 : inner,
              operands == kNvfp4 ? inner / 2 : inner);
  if (operands == kNvfp4) {
    check.tensor("weight_scale", args.weight_scale, one_of(DSV4_FLOAT8_E4M3FN), {experts, weight_rows, inner / 16});
    check.tensor("x_scale", args.x_scale, one_of(DSV4_FLOAT8_E4M3FN), {x_rows, inner / 16});
  } else if (operands == kMxfp8Mxfp4) {
    check.tensor("weight_scale", args.weight_scale, kE8m0, {experts, weight_rows, inner / 32});
    check.tensor("x_scale", args.x_scale, kE8m0, {x_rows, inner / 32});
  } else {
    check.require(!present(args.x_scale), "x_scale", "none with bfloat16 x", args.x_scale.rank);
  }
  check.tensor("tile_to_expert", args.tile_to_expert, one_of(DSV4_INT32), {kAny});
  check.tensor("row_to_slot", args.row_to_slot, one_of(DSV4_INT32), {kAny});
  const int64_t tile_size = tiles ? rows / tiles : 16;
  const int size = tiles * tile_size == rows ? size_index(tile_size) : -1;
  if (operands == kMxfp8Mxfp4)
    check.require(size == 0 || size == 2, "row_to_slot", "16 or 128 rows a tile (MXFP8 x)", rows);
  else
    check.require(size >= 0, "row_to_slot", "16, 64 or 128 rows a tile", rows);
  check.range("top_k", args.top_k, 0, DSV4_MAX_TOP_K);
  if (args.alpha.rank == 2)
    check.optional_tensor("alpha", args.alpha, one_of(DSV4_FLOAT32), {experts, args.swiglu ? 2 : 1});
  else
    check.optional_tensor("alpha", args.alpha, one_of(DSV4_FLOAT32), {experts});
  check.optional_tensor("slot_weights", args.slot_weights, one_of(DSV4_FLOAT32), {x_rows, args.top_k});
  if (present(args.slot_weights)) check.range("top_k", args.top_k, 1, DSV4_MAX_TOP_K);
  check.require(!std::isnan(args.limit), "limit", "a number", 0);
  check.tensor("out", args.out, one_of(DSV4_BFLOAT16), {rows, columns}, Layout::kStridedRows);
  for (const auto& [name, tensor] : {std::pair<const char*, const dsv4_tensor&>{"x", args.x},
                                     {"weight", args.weight},
                                     {"weight_scale", args.weight_scale},
                                     {"out", args.out}})
    check.aligned_rows(name, tensor, kAlignment);
  const auto misaligned = static_cast<long long>(reinterpret_cast<uintptr_t>(args.x_scale.data) % kAlignment);
  check.require(misaligned == 0, "x_scale", "an address that is a multiple of 16", misaligned);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tiles == 0 || x_rows == 0) return DSV4_OK;
  const Choice& choice = kChoices[operands][args.swiglu][size];
  const InterleavedChoice& by_words = kInterleavedChoices[nvfp4_weights][args.swiglu][size];
  const uint32_t column_blocks =
      interleaved ? blocks_for(weight_rows, by_words.weight_rows) : blocks_for(columns, choice.columns);
  const int64_t blocks = tiles * column_blocks;
  if (blocks > INT32_MAX)
    return fail(DSV4_ERROR_INVALID_ARGUMENT, "moe_grouped_gemm", "tile_to_expert",
                "expected at most %d tiles times blocks of columns, got %lld", INT32_MAX,
                static_cast<long long>(blocks));
  if (interleaved)
    return by_words.launch(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.weight.data,
                           args.weight_scale.data, args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data,
                           args.slot_weights.data, args.out.data, args.x.stride[0], args.out.stride[0],
                           static_cast<int32_t>(weight_rows), static_cast<int32_t>(inner),
                           static_cast<int32_t>(experts), static_cast<int32_t>(x_rows), args.top_k,
                           present(args.alpha) ? static_cast<int32_t>(alphas) : 0, present(args.slot_weights),
                           static_cast<int32_t>(column_blocks), args.limit > 0 ? args.limit : INFINITY);
  return choice.launch(target, dim3(static_cast<uint32_t>(blocks)), args.x.data, args.x_scale.data, args.weight.data,
                       args.weight_scale.data, args.tile_to_expert.data, args.row_to_slot.data, args.alpha.data,
                       args.slot_weights.data, args.out.data, args.x.stride[0], args.out.stride[0],
                       static_cast<int32_t>(columns), static_cast<int32_t>(inner), static_cast<int32_t>(experts),
                       static_cast<int32_t>(x_rows), args.top_k, present(args.alpha) ? static_cast<int32_t>(alphas) : 0,
                       present(args.slot_weights), static_cast<int32_t>(column_blocks),
                       args.limit > 0 ? args.limit : INFINITY);
}
