// One entry of a page: four neighbouring channels a thread, `head_dim / 4` neighbouring threads an entry.
#pragma once

#include <cuda_bf16.h>

#include "cache/page_layout.h"
#include "core/check.h"
#include "device/e8m0.cuh"
#include "device/fp4.cuh"
#include "device/fp8.cuh"
#include "device/reduce.cuh"

namespace dsv4 {

constexpr int kChannels = 4;  // of a thread

// A layout as kernels take it.
struct PageLayout {
  int32_t quantized_dims;
  int32_t element;  // a dsv4_dtype, as is scale
  int32_t group;
  int32_t scale;
  int32_t value_bytes;
  int32_t scale_bytes;
};

inline PageLayout page_layout(const dsv4_page_layout_info& info) {
  return {info.quantized_dims, info.element, info.group, info.scale, info.value_bytes, info.scale_bytes};
}

// All pages, and where an entry's values and scales are. `index` counts the entries of all pages.
struct Pages {
  uint8_t* data;
  int64_t count;
  int64_t stride;   // bytes
  int32_t entries;  // of a page

  __device__ bool holds(int64_t index) const { return index >= 0 && index < count * entries; }
  __device__ uint8_t* values(const PageLayout& layout, int64_t index) const {
    return data + index / entries * stride + index % entries * layout.value_bytes;
  }
  __device__ uint8_t* scales(const PageLayout& layout, int64_t index) const {
    return data + index / entries * stride + static_cast<int64_t>(entries) * layout.value_bytes +
           index % entries * layout.scale_bytes;
  }
};

inline Pages pages_of(const dsv4_tensor& pages, int32_t entries_per_page) {
  return {static_cast<uint8_t*>(pages.data), pages.shape[0], pages.stride[0], entries_per_page};
}

inline void check_pages(Check& check, const dsv4_tensor& pages, const dsv4_page_layout_info& layout,
                        int32_t entries_per_page) {
  check.range("entries_per_page", entries_per_page, 1, INT32_MAX / layout.value_bytes);
  check.tensor("pages", pages, one_of(DSV4_UINT8), {kAny, kAny}, Layout::kStridedRows);
  check.range("pages columns (bytes)", extent(pages, 1), page_bytes(layout, entries_per_page), INT64_MAX);
  check.aligned_rows("pages", pages, page_access_bytes(layout));
}

// Where engines differ to the bit; see dsv4_compress_flush_args.
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

// Two codes a byte, the even channel in the low nibble.
__device__ inline uint16_t encode_e2m1x4(const float (&v)[kChannels], bool ties_toward_zero) {
  const float values[8] = {v[0], v[1], v[2], v[3], 0.0f, 0.0f, 0.0f, 0.0f};
  return static_cast<uint16_t>(ties_toward_zero ? encode_e2m1x8<Ties::kTowardZero>(values)
                                                : encode_e2m1x8<Ties::kToEven>(values));
}

// Writes channels `channel` to `channel + 3` of an entry. Every lane of the warp must call it, with values that are
// bfloat16 already; those without `write` store nothing.
__device__ inline void store_entry(const PageLayout& layout, const Quantization& quantization, const Pages& pages,
                                   int64_t index, int channel, const float (&values)[kChannels], bool write) {
  uint8_t* const row = write ? pages.values(layout, index) : nullptr;
  if (layout.quantized_dims == 0) {
    if (write) *reinterpret_cast<uint2*>(row + 2 * channel) = pack_bfloat16(values);
    return;
  }
  float amax = fmaxf(fmaxf(fabsf(values[0]), fabsf(values[1])), fmaxf(fabsf(values[2]), fabsf(values[3])));
  for (int distance = layout.group / kChannels / 2; distance > 0; distance /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, distance));
  if (!write) return;
  if (channel >= layout.quantized_dims) {
    uint8_t* const rest = row + layout.quantized_dims;  // one byte a value: the only layouts with such a rest
    *reinterpret_cast<uint2*>(rest + 2 * (channel - layout.quantized_dims)) = pack_bfloat16(values);
    return;
  }

  const float largest = layout.element == DSV4_FLOAT8_E4M3FN ? kLargestE4m3 : kLargestE2m1;
  const float wanted = fmaxf(__fdiv_rn(fmaxf(amax, quantization.amax_floor), largest), quantization.scale_floor);
  uint8_t* const scale_place =
      pages.scales(layout, index) + channel / layout.group * (layout.scale == DSV4_FLOAT32 ? 4 : 1);
  const bool writes_scale = channel % layout.group == 0;
  float scaled[kChannels];
  if (layout.scale == DSV4_FLOAT8_E8M0FNU || (layout.scale == DSV4_FLOAT32 && !quantization.exact_scale)) {
    const uint32_t scale = ceil_e8m0(wanted);
    const float reciprocal = reciprocal_e8m0(scale);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) scaled[i] = values[i] * reciprocal;
    if (writes_scale && layout.scale == DSV4_FLOAT32) *reinterpret_cast<float*>(scale_place) = decode_e8m0(scale);
    if (writes_scale && layout.scale != DSV4_FLOAT32) *scale_place = static_cast<uint8_t>(scale);
  } else {
    const uint32_t code = encode_e4m3(wanted);
    const float scale = layout.scale == DSV4_FLOAT32 ? wanted : decode_e4m3(code);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) scaled[i] = scale == 0.0f ? 0.0f : __fdiv_rn(values[i], scale);
    if (writes_scale && layout.scale == DSV4_FLOAT32) *reinterpret_cast<float*>(scale_place) = scale;
    if (writes_scale && layout.scale != DSV4_FLOAT32) *scale_place = static_cast<uint8_t>(code);
  }
  if (layout.element == DSV4_FLOAT8_E4M3FN)
    *reinterpret_cast<uint32_t*>(row + channel) = encode_e4m3x4(scaled[0], scaled[1], scaled[2], scaled[3]);
  else
    *reinterpret_cast<uint16_t*>(row + channel / 2) = encode_e2m1x4(scaled, quantization.ties_toward_zero);
}

// Reads channels `channel` to `channel + 3` of an entry.
__device__ inline void load_entry(const PageLayout& layout, const Pages& pages, int64_t index, int channel,
                                  float (&values)[kChannels]) {
  const uint8_t* const row = pages.values(layout, index);
  if (channel >= layout.quantized_dims) {
    const uint8_t* const rest = row + layout.quantized_dims;
    const uint2 pairs = *reinterpret_cast<const uint2*>(rest + 2 * (channel - layout.quantized_dims));
    const float2 low = unpack_bfloat16(pairs.x), high = unpack_bfloat16(pairs.y);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
    return;
  }
  const uint8_t* const place =
      pages.scales(layout, index) + channel / layout.group * (layout.scale == DSV4_FLOAT32 ? 4 : 1);
  const float scale = layout.scale == DSV4_FLOAT32          ? *reinterpret_cast<const float*>(place)
                      : layout.scale == DSV4_FLOAT8_E8M0FNU ? decode_e8m0(*place)
                                                            : decode_e4m3(*place);
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
