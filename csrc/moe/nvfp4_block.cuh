// NVFP4: blocks of 16 E2M1 codes that share an E4M3 scale, under a float32 scale for many blocks. In float32, every
// operation rounded to nearest (reciprocals too):
//
//     block scale = e4m3(max(encode * (amax * (1/6)), floor))      encode = 448 * 6 / amax of all, decode = 1 / encode
//     code        = e2m1(value * (1 / (block scale * decode)))     or value * 0 if the block scale is 0
//
// This is the arithmetic of the reference in vLLM's tests; kernels of TensorRT-LLM, vLLM and FlashInfer do the same
// with approximate reciprocals, so that a code may differ where a value is next to a midpoint.
#pragma once

#include "device/fp4.cuh"
#include "device/fp8.cuh"
#include "moe/quantize_target.cuh"

namespace dsv4 {

constexpr int kNvfp4Block = 16;
static_assert(kNvfp4Block == kChunk, "a thread makes one block at a time");
constexpr float kNvfp4Range = kLargestE4m3 * kLargestE2m1;  // 2688

struct GlobalScale {
  float encode;  // what values are multiplied by
  float decode;  // what products of codes and block scales are multiplied by
};

// From a global scale as callers give it: what values are multiplied by if `reciprocal`, else what codes are.
__device__ inline GlobalScale global_scale_of(float value, bool reciprocal) {
  const float other = __frcp_rn(value);
  return reciprocal ? GlobalScale{value, other} : GlobalScale{other, value};
}

struct Nvfp4Rule {
  float scale_floor;
  bool ties_to_even;
};

// Encodes the values of one block, of which amax is the largest magnitude, and writes codes and scale. Where amax is
// NaN the scale is too, 0x7f, and all codes are +6.
__device__ inline void store_nvfp4_block(const Target& target, const Nvfp4Rule& rule, const GlobalScale& global,
                                         uint32_t row, uint32_t column, const float (&values)[kChunk], float amax) {
  const float wanted = global.encode * (amax * (1.0f / kLargestE2m1));
  const uint32_t scale = encode_e4m3(max_or_nan(wanted, rule.scale_floor));
  const float decoded = decode_e4m3(scale);
  const float factor = decoded == 0.0f ? 0.0f : __frcp_rn(decoded * global.decode);
  uint2 codes;
  uint32_t* const words[] = {&codes.x, &codes.y};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) scaled[i] = values[8 * half + i] * factor;
    *words[half] = rule.ties_to_even ? encode_e2m1x8(scaled) : encode_e2m1x8<Ties::kTowardZero>(scaled);
  }
  *target.data_at<uint2>(row, column, 2) = codes;
  target.scale[target.scale_offset(row, column / kNvfp4Block)] = static_cast<uint8_t>(scale);
}

// Quantises this thread's share of all blocks. fetch(row, &value) loads what the row's global scale is made of, and is
// false if it has none: its codes and scales are 0 then. scale_of(value) makes it, once the values are on their way
// too.
template <int Unit, bool kSwiglu, typename T, typename Fetch, typename ScaleOf>
__device__ inline void quantize_nvfp4_blocks(const Source& source, const Target& target, const Nvfp4Rule& rule,
                                             Fetch&& fetch, ScaleOf&& scale_of) {
  for_each_item(target, [&](uint32_t row, uint32_t column, Item item) {
    if (item == Item::kNothing) return;
    if (item == Item::kChunk) {
      float fetched = 0.0f;
      if (fetch(row, &fetched)) {
        const RawChunk<T, Unit, kSwiglu> raw = load_raw<T, Unit, kSwiglu>(source, row, column);
        const GlobalScale global = scale_of(fetched);
        float values[kChunk];
        values_of(source, raw, values);
        store_nvfp4_block(target, rule, global, row, column, values, largest_magnitude(values));
        return;
      }
      *target.data_at<uint2>(row, column, 2) = {0, 0};
    }
    target.scale[target.scale_offset(row, column / kNvfp4Block)] = 0;
  });
}

}  // namespace dsv4
