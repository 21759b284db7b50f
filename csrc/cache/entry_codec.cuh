// Encoding and decoding of one entry of a page: four adjacent channels per thread, `head_dim / 4` adjacent threads per
// entry.
#pragma once

#include <cuda_bf16.h>

#include "cache/page_layout.h"
#include "core/check.h"
#include "device/divide.cuh"
#include "device/e8m0.cuh"
#include "device/fp4.cuh"
#include "device/fp8.cuh"
#include "device/max_or_nan.cuh"
#include "device/reduce.cuh"

namespace dsv4 {

constexpr int kChannels = 4;  // per thread

// A page layout as a kernel parameter.
struct PageLayout {
  int32_t quantized_dims;
  int32_t element;  // a dsv4_dtype, as is scale
  int32_t group;
  int32_t scale;
};

inline PageLayout page_layout(const dsv4_page_layout_info& info) {
  return {info.quantized_dims, info.element, info.group, info.scale};
}

// Where an entry is; page -1 if it is stored nowhere.
struct Place {
  int64_t page;
  int32_t slot;

  __device__ bool exists() const { return page >= 0; }
};

// One part of all entries: their quantised values, their scales, or their values in bfloat16.
struct Part {
  uint8_t* data;
  int64_t page_bytes;
  int32_t entry_bytes;

  __device__ uint8_t* at(const Place& place) const { return data + place.page * page_bytes + place.slot * entry_bytes; }
};

struct Pages {
  Part values;
  Part scales;
  Part rest;
  int64_t count;
  Divisor entries;  // per page
  LongDivisor entries_of_index;

  // From an index that counts the entries of all pages.
  __device__ Place place(int64_t index) const {
    const int64_t page = index < 0 ? -1 : entries_of_index.quotient(index);
    return {page < count ? page : -1, static_cast<int32_t>(index - page * entries_of_index.value)};
  }
};

inline Pages pages_of(const dsv4_tensor& pages, const dsv4_tensor& scales, const dsv4_tensor& rope,
                      const dsv4_page_layout_info& layout, int32_t entries) {
  const auto bytes = [](const dsv4_tensor& tensor) { return static_cast<uint8_t*>(tensor.data); };
  Pages all = {};
  all.count = pages.shape[0];
  all.entries = Divisor(entries);
  all.entries_of_index = LongDivisor(entries);
  const int32_t rest_bytes = 2 * (layout.head_dim - layout.quantized_dims);
  if (layout.separate) {
    const auto part = [&](const dsv4_tensor& tensor, int32_t entry_bytes) -> Part {
      return {bytes(tensor), int64_t{entries} * entry_bytes, entry_bytes};
    };
    all.values = part(pages, layout.value_bytes);
    all.scales = part(scales, layout.scale_bytes);
    all.rest = part(rope, rest_bytes);
  } else {
    const auto part = [&](int64_t offset, int32_t entry_bytes) -> Part {
      return {bytes(pages) + offset, pages.stride[0], entry_bytes};
    };
    all.values = part(0, layout.value_bytes);
    all.scales = part(int64_t{entries} * layout.value_bytes, layout.scale_bytes);
    all.rest = part(layout.value_bytes - rest_bytes, layout.value_bytes);
  }
  return all;
}

inline void check_pages(Check& check, const dsv4_tensor& pages, const dsv4_tensor& scales, const dsv4_tensor& rope,
                        const dsv4_page_layout_info& layout, int32_t entries_per_page) {
  const bool with_rope = layout.separate && layout.quantized_dims < layout.head_dim;
  check.range("entries_per_page", entries_per_page, 1, INT32_MAX / layout.value_bytes);
  if (!layout.separate) check.absent("scales", scales, "for a layout whose pages hold them");
  if (!with_rope) check.absent("rope", rope, "for a layout whose pages hold it, or that has none");
  if (!layout.separate) {
    check.tensor("pages", pages, one_of(DSV4_UINT8), {kAny, kAny}, Layout::kStridedRows);
    check.range("pages columns (bytes)", extent(pages, 1), page_bytes(layout, entries_per_page), INT64_MAX);
    check.aligned_rows("pages", pages, page_access_bytes(layout));
    return;
  }
  const int64_t count = extent(pages, 0);
  check.tensor("pages", pages, one_of(DSV4_UINT8, layout.element), {kAny, entries_per_page, layout.value_bytes});
  check.aligned_rows("pages", pages, kChannels);
  const DtypeSet scale_types = layout.scale == DSV4_FLOAT32 ? one_of(DSV4_FLOAT32) : one_of(DSV4_UINT8, layout.scale);
  if (layout.group == layout.quantized_dims)
    check.tensor("scales", scales, scale_types, {count, entries_per_page});
  else
    check.tensor("scales", scales, scale_types, {count, entries_per_page, layout.quantized_dims / layout.group});
  if (!with_rope) return;
  check.tensor("rope", rope, one_of(DSV4_BFLOAT16), {count, entries_per_page, layout.head_dim - layout.quantized_dims});
  check.aligned_rows("rope", rope, sizeof(uint2));
}

// Rounding rules in which engines differ; see dsv4_compress_flush_args.
struct Quantization {
  float amax_floor;
  float scale_floor;
  bool ties_toward_zero;
  bool exact_scale;
};

__device__ inline float round_to_bfloat16(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

__device__ inline uint2 pack_bfloat16(const float (&values)[kChannels]) {
  const auto pair = [](float low, float high) {
    return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(low))) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
  };
  return {pair(values[0], values[1]), pair(values[2], values[3])};
}

__device__ inline float2 unpack_bfloat16(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Two codes per byte, the even channel in the low nibble.
__device__ inline uint16_t encode_e2m1x4(const float (&v)[kChannels], bool ties_toward_zero) {
  const float values[8] = {v[0], v[1], v[2], v[3], 0.0f, 0.0f, 0.0f, 0.0f};
  return static_cast<uint16_t>(ties_toward_zero ? encode_e2m1x8<Ties::kTowardZero>(values)
                                                : encode_e2m1x8<Ties::kToEven>(values));
}

// A group's scale before it is rounded to the stored format; NaN if amax is NaN.
__device__ inline float wanted_scale(float amax, float largest, float amax_floor, float scale_floor = 0.0f) {
  return max_or_nan(__fdiv_rn(max_or_nan(amax, amax_floor), largest), scale_floor);
}

// values / scale, rounded to nearest; 0 if the scale is 0.
template <int Count>
__device__ inline void divide_by_scale(float (&values)[Count], float scale) {
  const bool none = scale == 0.0f;
  const float divisor = none ? 1.0f : scale;  // division by 0 takes the slow path of IEEE division
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const float quotient = __fdiv_rn(values[i], divisor);
    values[i] = none ? 0.0f : quotient;
  }
}

// Maximum over a group of lanes (a power of two), NaN if any is NaN; every lane of the warp must call it.
__device__ inline float max_over_group(float value, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2)
    value = max_or_nan(value, __shfl_xor_sync(kFullWarp, value, distance));
  return value;
}

// A barrier of the block's first four warps alone.
__device__ inline void await_four_warps() { asm volatile("barrier.sync 1, 128;" ::: "memory"); }

// Maximum, or NaN, over the first four warps of the block. `scratch`, 16-byte aligned, is in use until the next
// barrier.
__device__ inline float max_over_four_warps(float value, float* scratch) {
  value = max_over_group(value, kWarpLanes);
  if (threadIdx.x % kWarpLanes == 0) scratch[threadIdx.x / kWarpLanes] = value;
  await_four_warps();
  const float4 all = *reinterpret_cast<const float4*>(scratch);
  return max_or_nan(max_or_nan(all.x, all.y), max_or_nan(all.z, all.w));
}

// Writes channels `channel` to `channel + 3` of an entry, values that are bfloat16 already. Every thread of the entry
// must call it. `scratch` is for max_over_four_warps().
__device__ inline void store_entry(const PageLayout& layout, const Quantization& quantization, const Pages& pages,
                                   const Place& place, int channel, const float (&values)[kChannels], float* scratch) {
  float amax = 0.0f;
  if (channel < layout.quantized_dims)
    amax = max_or_nan(max_or_nan(fabsf(values[0]), fabsf(values[1])), max_or_nan(fabsf(values[2]), fabsf(values[3])));
  const int lanes = layout.group / kChannels;
  if (lanes > kWarpLanes)
    amax = max_over_four_warps(amax, scratch);
  else
    amax = max_over_group(amax, lanes);
  if (channel >= layout.quantized_dims) {
    uint8_t* const rest = pages.rest.at(place) + 2 * (channel - layout.quantized_dims);
    *reinterpret_cast<uint2*>(rest) = pack_bfloat16(values);
    return;
  }

  const float largest = layout.element == DSV4_FLOAT8_E4M3FN ? kLargestE4m3 : kLargestE2m1;
  const float wanted = wanted_scale(amax, largest, quantization.amax_floor, quantization.scale_floor);
  const bool wide = layout.scale == DSV4_FLOAT32;
  const int group = channel / layout.group;
  uint8_t* const scale_place = pages.scales.at(place) + group * (wide ? 4 : 1);
  const bool writes_scale = channel == group * layout.group;
  float scaled[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) scaled[i] = values[i];
  if (layout.scale == DSV4_FLOAT8_E8M0FNU || (wide && !quantization.exact_scale)) {
    const uint32_t scale = ceil_e8m0(wanted);
    const float reciprocal = reciprocal_e8m0(scale);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) scaled[i] *= reciprocal;
    if (writes_scale && wide) *reinterpret_cast<float*>(scale_place) = decode_e8m0(scale);
    if (writes_scale && !wide) *scale_place = static_cast<uint8_t>(scale);
  } else {
    const uint32_t code = encode_e4m3(wanted);
    divide_by_scale(scaled, wide ? wanted : decode_e4m3(code));
    if (writes_scale && wide) *reinterpret_cast<float*>(scale_place) = wanted;
    if (writes_scale && !wide) *scale_place = static_cast<uint8_t>(code);
  }
  uint8_t* const row = pages.values.at(place);
  if (layout.element == DSV4_FLOAT8_E4M3FN)
    *reinterpret_cast<uint32_t*>(row + channel) = encode_e4m3x4(scaled[0], scaled[1], scaled[2], scaled[3]);
  else
    *reinterpret_cast<uint16_t*>(row + channel / 2) = encode_e2m1x4(scaled, quantization.ties_toward_zero);
}

// Reads channels `channel` to `channel + 3` of an entry.
__device__ inline void load_entry(const PageLayout& layout, const Pages& pages, const Place& place, int channel,
                                  float (&values)[kChannels]) {
  if (channel >= layout.quantized_dims) {
    const uint8_t* const rest = pages.rest.at(place) + 2 * (channel - layout.quantized_dims);
    const uint2 pairs = *reinterpret_cast<const uint2*>(rest);
    const float2 low = unpack_bfloat16(pairs.x), high = unpack_bfloat16(pairs.y);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
    return;
  }
  const uint8_t* const row = pages.values.at(place);
  const uint8_t* const scale_place =
      pages.scales.at(place) + channel / layout.group * (layout.scale == DSV4_FLOAT32 ? 4 : 1);
  const float scale = layout.scale == DSV4_FLOAT32          ? *reinterpret_cast<const float*>(scale_place)
                      : layout.scale == DSV4_FLOAT8_E8M0FNU ? decode_e8m0(*scale_place)
                                                            : decode_e4m3(*scale_place);
  if (layout.element == DSV4_FLOAT8_E4M3FN) {
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(row + channel);
    const float2 low = decode_e4m3x2(codes & 0xffffu), high = decode_e4m3x2(codes >> 16);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
  } else {
    const uint32_t codes = *reinterpret_cast<const uint16_t*>(row + channel / 2);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = decode_e2m1(codes >> 4 * i);
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) values[i] *= scale;
}

}  // namespace dsv4
