// From codes with scales for blocks of them back to values: NVFP4, MXFP4, MXFP8, and FP8 with one scale per row.
#include "device/e8m0.cuh"
#include "device/fp4.cuh"
#include "device/fp8.cuh"
#include "moe/quantize_target.cuh"

namespace dsv4 {

constexpr int kStoreBytes = 16;  // of a thread: neighbouring threads store side by side

struct Scales {
  const void* values;
  const float* global;        // null: none
  const int32_t* expert_ids;  // of global
  uint32_t globals;
  uint32_t group_shift;   // log2 of the elements that share a scale
  uint32_t columns;       // of scales
  uint32_t column_tiles;  // of swizzled scales
  int32_t format;         // a dsv4_scale_format
  bool swizzle;
  bool reciprocal;

  // The scale of the elements from a column on.
  __device__ float block(uint32_t row, uint32_t column) const {
    if (format == DSV4_SCALE_FLOAT32) return static_cast<const float*>(values)[row];
    const uint32_t group = column >> group_shift;
    const int64_t place =
        swizzle ? swizzled_offset(row, group, column_tiles) : static_cast<int64_t>(row) * columns + group;
    const uint8_t code = static_cast<const uint8_t*>(values)[place];
    return format == DSV4_SCALE_E4M3 ? decode_e4m3(code) : decode_e8m0(code);
  }

  // What products of codes and block scales are multiplied by; 0 for a row without one.
  __device__ float of_row(uint32_t row) const {
    if (!global) return 1.0f;
    const uint32_t index = expert_ids ? static_cast<uint32_t>(expert_ids[row]) : globals == 1 ? 0 : row;
    if (index >= globals) return 0.0f;
    return reciprocal ? __frcp_rn(global[index]) : global[index];
  }
};

template <typename T, bool kFp4>
__global__ void __launch_bounds__(kQuantizeThreads)
    dequantize_blocks_kernel(const uint8_t* __restrict__ data, Scales scales, T* __restrict__ out, uint32_t items,
                             Divisor row_items) {
  await_previous_grid();
  constexpr int kElements = kStoreBytes / sizeof(T);
  using Codes = Vector<uint8_t, kFp4 ? kElements / 2 : kElements>;
  const uint32_t step = gridDim.x * kQuantizeThreads;
  for (uint32_t item = blockIdx.x * kQuantizeThreads + threadIdx.x; item < items; item += step) {
    const Codes codes = reinterpret_cast<const Codes*>(data)[item];
    const uint32_t row = row_items.quotient(item);
    const uint32_t column = (item - row * row_items.value) * kElements;
    const float block = scales.block(row, column), of_row = scales.of_row(row);
    Vector<T, kElements> values;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float value = kFp4 ? decode_e2m1(codes.values[i / 2] >> 4 * (i % 2)) : decode_e4m3(codes.values[i]);
      values.values[i] = static_cast<T>(value * block * of_row);
    }
    reinterpret_cast<Vector<T, kElements>*>(out)[item] = values;
  }
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_dequantize_blocks(const dsv4_dequantize_blocks_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("dequantize_blocks");
  const dsv4_dequantize_blocks_args args = check.read(given);
  check.range("element_format", args.element_format, DSV4_ELEMENT_E4M3, DSV4_ELEMENT_E2M1);
  check.range("scale_format", args.scale_format, DSV4_SCALE_E4M3, DSV4_SCALE_FLOAT32);
  const bool fp4 = args.element_format == DSV4_ELEMENT_E2M1;
  const int64_t codes_per_byte = fp4 ? 2 : 1, bytes = kChunk / codes_per_byte;
  const int64_t rows = extent(args.data, 0), columns = saturating_product(extent(args.data, 1), codes_per_byte);
  const int64_t group = args.scale_format == DSV4_SCALE_E4M3 ? 16 : args.scale_format == DSV4_SCALE_E8M0 ? 32 : kChunk;
  check.tensor("data", args.data, fp4 ? kFp4Dtypes : kE4m3Dtypes, {kAny, kAny});
  check.multiple("data columns", extent(args.data, 1), group / codes_per_byte);
  check.range("data rows", rows, 0, INT32_MAX);
  const int64_t out_bytes = dtype_bytes(args.out.dtype);
  const int64_t row_stores = saturating_product(columns, out_bytes) / kStoreBytes;
  check.range("out bytes, in 16s", saturating_product(rows, row_stores), 0, INT32_MAX);
  check.aligned_rows("data", args.data, bytes);
  check.range("swizzle", args.swizzle, 0, args.scale_format == DSV4_SCALE_FLOAT32 ? 0 : 1);
  if (args.scale_format == DSV4_SCALE_FLOAT32) {
    check.tensor("scale", args.scale, one_of(DSV4_FLOAT32), {rows});
  } else {
    const DtypeSet dtypes = args.scale_format == DSV4_SCALE_E4M3 ? kE4m3Dtypes : kE8m0Dtypes;
    if (args.swizzle)
      check.tensor("scale", args.scale, dtypes, {swizzled_rows(rows), swizzled_columns(columns / group)});
    else
      check.tensor("scale", args.scale, dtypes, {rows, columns / group});
  }
  if (present(args.global_scale) || present(args.expert_ids)) check_global_scale(check, args, rows);
  check.tensor("out", args.out, one_of(DSV4_BFLOAT16, DSV4_FLOAT16, DSV4_FLOAT32), {rows, columns});
  check.aligned_rows("out", args.out, kStoreBytes);
  LaunchTarget launch_target;
  if (dsv4_status status = check.open(stream, &launch_target)) return status;

  if (rows == 0 || columns == 0) return DSV4_OK;
  const Scales scales = {args.scale.data,
                         static_cast<const float*>(args.global_scale.data),
                         static_cast<const int32_t*>(args.expert_ids.data),
                         static_cast<uint32_t>(elements(args.global_scale)),
                         group == 16 ? 4u : 5u,
                         static_cast<uint32_t>(columns / group),
                         static_cast<uint32_t>(swizzle_tiles_across(columns / group)),
                         args.scale_format,
                         args.swizzle != 0,
                         args.reciprocal_global_scale != 0};
  const Divisor row_items(static_cast<uint32_t>(columns * out_bytes / kStoreBytes));
  const auto items = static_cast<uint32_t>(rows * row_items.value);
  const uint32_t blocks = quantize_blocks(*launch_target.device, items);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto* const data = static_cast<const uint8_t*>(args.data.data);
    auto* const out = static_cast<T*>(args.out.data);
    return fp4 ? launch<dequantize_blocks_kernel<T, true>>(launch_target, {blocks, kQuantizeThreads}, data, scales, out,
                                                           items, row_items)
               : launch<dequantize_blocks_kernel<T, false>>(launch_target, {blocks, kQuantizeThreads}, data, scales,
                                                            out, items, row_items);
  };
  switch (args.out.dtype) {
    case DSV4_FLOAT32: return run(float{});
    case DSV4_FLOAT16: return run(__half{});
    default: return run(__nv_bfloat16{});
  }
}
