// The values that a quantising kernel encodes: the rows of a tensor, the gate columns of a tensor of gates and ups, or
// SwiGLU of both. A thread takes kChunk neighbouring values of a row at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dsv4/moe.h>

#include "core/check.h"
#include "core/dtype.h"
#include "device/max_or_nan.cuh"
#include "device/swiglu.cuh"

namespace dsv4 {

constexpr int kChunk = 16;

struct Source {
  const void* x;
  int64_t row_stride;    // elements
  uint32_t gate_blocks;  // column c of the result is column c + (c & gate_blocks) of x
  uint32_t up_distance;  // from a gate to its up
  bool aligned;          // whether vector loads are possible
  bool round;            // results of SwiGLU to bfloat16
  float limit;           // of SwiGLU's arguments
};

template <typename T, int Unit>
struct alignas(Unit * sizeof(T)) Vector {
  T values[Unit];
};

template <int Unit, typename T>
__device__ inline Vector<T, Unit> load_vector(const T* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vector<T, Unit>*>(from);
  Vector<T, Unit> result;
#pragma unroll
  for (int i = 0; i < Unit; ++i) result.values[i] = from[i];
  return result;
}

// What a thread reads for a chunk. Unit: elements that lie side by side in x, loaded at once.
template <typename T, int Unit, bool kSwiglu>
struct RawChunk {
  Vector<T, Unit> gates[kChunk / Unit];
  Vector<T, Unit> ups[kSwiglu ? kChunk / Unit : 1];
};

// Of columns `column` to `column + kChunk - 1` of the result.
template <typename T, int Unit, bool kSwiglu>
__device__ inline RawChunk<T, Unit, kSwiglu> load_raw(const Source& source, int64_t row, uint32_t column) {
  const T* const from = static_cast<const T*>(source.x) + row * source.row_stride;
  RawChunk<T, Unit, kSwiglu> raw;
#pragma unroll
  for (int i = 0; i < kChunk / Unit; ++i) {
    const uint32_t first = column + i * Unit;
    const uint32_t place = first + (first & source.gate_blocks);
    raw.gates[i] = load_vector<Unit>(from + place, source.aligned);
    if constexpr (kSwiglu) raw.ups[i] = load_vector<Unit>(from + place + source.up_distance, source.aligned);
  }
  return raw;
}

template <typename T, int Unit, bool kSwiglu>
__device__ inline void values_of(const Source& source, const RawChunk<T, Unit, kSwiglu>& raw, float (&values)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    values[i] = static_cast<float>(raw.gates[i / Unit].values[i % Unit]);
    if constexpr (kSwiglu) {
      values[i] = swiglu(values[i], static_cast<float>(raw.ups[i / Unit].values[i % Unit]), source.limit);
      if (source.round) values[i] = __bfloat162float(__float2bfloat16_rn(values[i]));
    }
  }
}

template <int Unit, bool kSwiglu, typename T>
__device__ inline void load_chunk(const Source& source, int64_t row, uint32_t column, float (&values)[kChunk]) {
  values_of(source, load_raw<T, Unit, kSwiglu>(source, row, column), values);
}

// The largest magnitude; NaN if one of the values is.
__device__ inline float largest_magnitude(const float (&values)[kChunk]) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) amax = max_or_nan(amax, fabsf(values[i]));
  return amax;
}

// Columns of the values that a source makes of x.
inline int64_t source_columns(const dsv4_tensor& x, int32_t source) {
  return source == DSV4_SOURCE_PLAIN ? extent(x, 1) : extent(x, 1) / 2;
}

// The checks of x and of how it is read, for values in groups of `group`.
template <typename Args>
void check_source(Check& check, const Args& args, int64_t group) {
  check.tensor("x", args.x, one_of(DSV4_BFLOAT16, DSV4_FLOAT16, DSV4_FLOAT32), {kAny, kAny}, Layout::kStridedRows);
  check.range("source", args.source, DSV4_SOURCE_PLAIN, DSV4_SOURCE_SWIGLU);
  const bool plain = args.source == DSV4_SOURCE_PLAIN;
  check.multiple("x columns", extent(args.x, 1), plain ? group : 2 * group);
  if (plain) {
    check.range("granularity", args.granularity, 0, 0);
  } else if (args.source == DSV4_SOURCE_DEINTERLEAVE || args.granularity != 0) {
    const int64_t columns = source_columns(args.x, args.source);
    const bool power = args.granularity >= 4 && (args.granularity & (args.granularity - 1)) == 0;
    check.require(power, "granularity", "a power of two from 4", args.granularity);
    if (power) check.multiple("x columns over 2", columns, args.granularity);
  }
  check.flag("round_to_bfloat16", args.round_to_bfloat16);
  check.number("limit", args.limit, 0.0f);
}

// Whether every row starts on a multiple of so many bytes.
inline bool has_aligned_rows(const dsv4_tensor& tensor, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(bytes) == 0 &&
         (tensor.shape[0] < 2 || tensor.stride[0] * dtype_bytes(tensor.dtype) % bytes == 0);
}

template <typename Args>
Source make_source(const Args& args) {
  Source source = {};
  const int64_t half = extent(args.x, 1) / 2;
  const int64_t vector = args.granularity == 4 && args.x.dtype != DSV4_FLOAT32 ? 8 : 16;  // bytes
  source.x = args.x.data;
  source.row_stride = args.x.stride[0];
  source.gate_blocks = args.granularity == 0 ? 0 : ~static_cast<uint32_t>(args.granularity - 1);
  source.up_distance = static_cast<uint32_t>(args.granularity == 0 ? half : args.granularity);
  source.aligned = has_aligned_rows(args.x, vector);
  source.round = args.round_to_bfloat16 != 0;
  source.limit = args.limit > 0.0f ? args.limit : INFINITY;
  return source;
}

// Calls function with a zero of the type of x, the elements of a load and whether it is SwiGLU: what a kernel is
// instantiated for.
template <typename Args, typename Function>
dsv4_status with_source(const Args& args, Function&& function) {
  const auto with_swiglu = [&](auto type, auto unit) {
    return args.source == DSV4_SOURCE_SWIGLU ? function(type, unit, std::true_type{})
                                             : function(type, unit, std::false_type{});
  };
  const auto with_unit = [&](auto type) {
    return args.granularity == 4 ? with_swiglu(type, std::integral_constant<int, 4>{})
                                 : with_swiglu(type, std::integral_constant<int, 8>{});
  };
  switch (args.x.dtype) {
    case DSV4_FLOAT32: return with_swiglu(float{}, std::integral_constant<int, 4>{});
    case DSV4_FLOAT16: return with_unit(__half{});
    default: return with_unit(__nv_bfloat16{});
  }
}

}  // namespace dsv4
