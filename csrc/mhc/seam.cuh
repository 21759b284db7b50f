// A seam, the place between two sublayers: update, projection, Sinkhorn, collapse and norm of the streams of a token.
//
// Two kernels, one after the other. The first (projection.cuh) updates the streams and multiplies them with fn: its
// blocks have some columns of many tokens, so that fn is read once. The second (finish.cuh) has all columns of a token:
// it adds the partial sums of the first, has the coefficients, collapses and norms.
//
// The order of all sums follows from `hidden` and the device alone. A unit is 32 columns of all four streams: the sums
// of each stream are taken on its own and added in order. Units are added in order within a slice, slices as in
// sum_of_slices(). So a token has the same bits in every batch, whatever schedule computes it.
#pragma once

#include "device/reduce.cuh"
#include "mhc/seam_policy.h"
#include "mhc/streams.cuh"

namespace dsv4 {

enum class Form { kPre, kPostPre, kCoefficients, kHead };

struct Seam {
  Streams streams;
  UpdateInputs update;
  Streams out_streams;
  const float* fn;
  const float* base;
  const float* scale;
  const float4* pre_in;  // may be null
  NormWeight norm_weight;
  __nv_bfloat16* out_layer_input;
  float* out_pre;
  float* out_post;
  float* out_comb;
  float* partial_sums;  // [tokens][slices] rows; zero between calls
  uint32_t tokens;
  int hidden;
  int units;                                  // of 32 columns
  int slices;                                 // that have columns
  int slice_units;                            // units of a slice; the last one has what is left
  int sum_slices;                             // slices of one of a token's kSumsOfToken sums
  float reciprocal_width, reciprocal_hidden;  // of a token's streams, and of one
  float epsilon, hc_epsilon, post_factor;
  int iterations;
  bool norm_unrounded;

  // Of the token's partial sums.
  __device__ float* row_of(uint32_t token, int slice, int row_floats) const {
    return partial_sums + (static_cast<int64_t>(token) * slices + slice) * row_floats;
  }
};

__device__ inline float4& operator+=(float4& sum, const float4& value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
  return sum;
}

template <Form kForm>
constexpr int kRowsOf = kForm == Form::kHead ? kStreams : 24;  // of fn
template <Form kForm>
constexpr int kValuesOf = kRowsOf<kForm> + 1;  // of a token: the products, and the sum of squares
// A row of partial sums: whole 32-byte sectors.
template <Form kForm>
constexpr int kRowFloats = (kValuesOf<kForm> + 7) / 8 * 8;
template <Form kForm>
constexpr bool kUpdates = kForm == Form::kPostPre;
template <Form kForm>
constexpr bool kCollapses = kForm != Form::kCoefficients;

// The streams that are projected and collapsed.
template <Form kForm>
__device__ inline const Streams& new_streams(const Seam& seam) {
  return kUpdates<kForm> ? seam.out_streams : seam.streams;
}

}  // namespace dsv4
