// The parts of a hyper-connection that work on eight neighbouring columns of a token, whose sums have one order
// wherever they are computed: the update, the collapse, the norm.
#pragma once

#include <dsv4/mhc.h>

#include "core/check.h"
#include "core/launch.h"
#include "device/bfloat16.cuh"

namespace dsv4 {

constexpr int kStreams = 4;
constexpr int kChunk = 8;  // bfloat16 values of a 16-byte load
constexpr int64_t kMaxHidden = 8192;

// [tokens, 4, hidden]; strides in elements.
struct Streams {
  __nv_bfloat16* data;
  int64_t token_stride, stream_stride;

  __device__ uint4* chunk(int64_t token, int stream, int column) const {
    return reinterpret_cast<uint4*>(data + token * token_stride + stream * stream_stride + column);
  }
};

// A chunk of each stream of a token.
struct StreamChunks {
  uint4 of[kStreams];
};

__device__ inline StreamChunks load_chunks(const Streams& streams, int64_t token, int column) {
  StreamChunks chunks;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) chunks.of[j] = *streams.chunk(token, j, column);
  return chunks;
}

__device__ inline void store_chunks(const Streams& streams, int64_t token, int column, const StreamChunks& chunks) {
#pragma unroll
  for (int k = 0; k < kStreams; ++k) *streams.chunk(token, k, column) = chunks.of[k];
}

// What a sublayer's output is added with, and the streams are mixed with.
struct UpdateInputs {
  const __nv_bfloat16* x;  // [tokens, hidden]
  const float4* post;      // [tokens, 4]
  const float4* comb;      // [tokens, 4, 4]
  int64_t x_stride;        // in elements

  __device__ const uint4* chunk_of_x(int64_t token, int column) const {
    return reinterpret_cast<const uint4*>(x + token * x_stride + column);
  }
};

struct UpdateCoefficients {
  float post[kStreams];
  float comb[kStreams][kStreams];  // [old stream][new stream]
};

__device__ inline UpdateCoefficients load_coefficients(const UpdateInputs& inputs, int64_t token) {
  UpdateCoefficients coefficients;
  reinterpret_cast<float4&>(coefficients.post) = inputs.post[token];
#pragma unroll
  for (int j = 0; j < kStreams; ++j)
    reinterpret_cast<float4&>(coefficients.comb[j]) = inputs.comb[token * kStreams + j];
  return coefficients;
}

// A pair of columns after the other: the registers of one serve the next.
__device__ inline StreamChunks update(const StreamChunks& old, const uint4& x, const UpdateCoefficients& by) {
  StreamChunks result;
#pragma unroll
  for (int pair = 0; pair < kChunk / 2; ++pair) {
    const uint32_t y = word_of(x, pair);
    float low[kStreams], high[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j)
      low[j] = low_half(word_of(old.of[j], pair)), high[j] = high_half(word_of(old.of[j], pair));
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      float low_sum = by.post[k] * low_half(y), high_sum = by.post[k] * high_half(y);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        low_sum = fmaf(by.comb[j][k], low[j], low_sum);
        high_sum = fmaf(by.comb[j][k], high[j], high_sum);
      }
      word_of(result.of[k], pair) = pack_bfloat16(low_sum, high_sum);
    }
  }
  return result;
}

// What is rounded to u, and the sum of its squares, of the rounded values or as they were before.
__device__ inline uint4 collapse(const StreamChunks& streams, float4 pre, bool squares_unrounded, float* squares) {
  const float factors[kStreams] = {pre.x, pre.y, pre.z, pre.w};
  float sums[kChunk] = {}, r[kChunk];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    unpack_eight(streams.of[j], r);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums[i] = fmaf(factors[j], r[i], sums[i]);
  }
  const uint4 rounded = pack_eight(sums);
  if (!squares_unrounded) unpack_eight(rounded, sums);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) *squares = fmaf(sums[i], sums[i], *squares);
  return rounded;
}

// [hidden] float32 or bfloat16.
struct NormWeight {
  const void* data;  // null: no norm
  bool is_float;

  __device__ void load(int column, float (&values)[kChunk]) const {
    if (is_float) {
      const auto* const from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + column);
      reinterpret_cast<float4&>(values[0]) = __ldg(from);
      reinterpret_cast<float4&>(values[4]) = __ldg(from + 1);
    } else {
      unpack_eight(__ldg(reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(data) + column)), values);
    }
  }
};

__device__ inline uint4 normalize(uint4 u, float reciprocal_root, const float (&weight)[kChunk]) {
  float values[kChunk];
  unpack_eight(u, values);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] = weight[i] * (values[i] * reciprocal_root);
  return pack_eight(values);
}

// ---------------------------------------------------------------------------------------------------------- arguments

inline Streams streams_of(const dsv4_tensor& tensor) {
  return {static_cast<__nv_bfloat16*>(tensor.data), tensor.stride[0], tensor.stride[1]};
}

inline NormWeight norm_weight_of(const dsv4_tensor& tensor) { return {tensor.data, tensor.dtype == DSV4_FLOAT32}; }

inline UpdateInputs update_inputs_of(const dsv4_tensor& x, const dsv4_tensor& post, const dsv4_tensor& comb) {
  return {static_cast<const __nv_bfloat16*>(x.data), static_cast<const float4*>(post.data),
          static_cast<const float4*>(comb.data), x.stride[0]};
}

// [tokens, 4, hidden], tokens and streams on multiples of 16 bytes.
inline void check_streams(Check& check, const char* name, const dsv4_tensor& streams, int64_t tokens, int64_t hidden) {
  constexpr int64_t kBytes = sizeof(uint4);
  check.tensor(name, streams, one_of(DSV4_BFLOAT16), {tokens, kStreams, hidden}, Layout::kStridedRows);
  check.range("hidden (columns of a stream)", extent(streams, 2), kChunk, kMaxHidden);
  check.multiple("hidden (columns of a stream)", extent(streams, 2), kChunk);
  check.aligned_rows(name, streams, kBytes);
  if (!check.status() && extent(streams, 0) > 0)
    check.multiple("elements from stream to stream", streams.stride[1], kChunk);
}

inline void check_update(Check& check, const dsv4_tensor& x, const dsv4_tensor& post, const dsv4_tensor& comb,
                         int64_t tokens, int64_t hidden) {
  check.tensor("x", x, one_of(DSV4_BFLOAT16), {tokens, hidden}, Layout::kStridedRows);
  check.aligned_rows("x", x, sizeof(uint4));
  check.tensor("post", post, one_of(DSV4_FLOAT32), {tokens, kStreams});
  check.aligned_rows("post", post, sizeof(float4));
  check.tensor("comb", comb, one_of(DSV4_FLOAT32), {tokens, kStreams, kStreams});
  check.aligned_rows("comb", comb, sizeof(float4));
}

inline void check_norm(Check& check, const dsv4_tensor& norm_weight, int32_t norm_unrounded, int64_t hidden) {
  check.optional_tensor("norm_weight", norm_weight, one_of(DSV4_FLOAT32, DSV4_BFLOAT16), {hidden});
  if (present(norm_weight)) check.aligned_rows("norm_weight", norm_weight, sizeof(uint4));
  check.flag("norm_unrounded", norm_unrounded);
}

}  // namespace dsv4
