// Softmax-weighted sums of rows, per column, four adjacent columns per thread, in one pass over any number of rows
// (online softmax).
#pragma once

#include <math_constants.h>

#include "device/reduce.cuh"
#include "device/row.cuh"

namespace dsv4 {

// exp in three instructions. The rounding of the product gives an absolute error of |x| e^x 2^-24, at most 2^-25.
__device__ inline float exp_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 0x1.715476p+0f));  // log2(e)
  return result;
}

// sum softmax(z) * k over the rows added so far is value / sum; both are relative to the largest score, `top`.
struct PooledRows {
  float top[kFour];
  float sum[kFour];
  float value[kFour];

  __device__ PooledRows() {
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      top[j] = -CUDART_INF_F;
      sum[j] = value[j] = 0.0f;
    }
  }

  // Adds rows whose scores and values are in registers. A score of -inf adds nothing.
  template <int Rows>
  __device__ void add(const Four<float> (&scores)[Rows], const Four<float> (&values)[Rows]) {
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      float highest = top[j];
#pragma unroll
      for (int row = 0; row < Rows; ++row) highest = fmaxf(highest, scores[row].values[j]);
      const float base = finite_base(highest);
      const float keep = exp_of(top[j] - base);
      sum[j] *= keep;
      value[j] *= keep;
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        const float weight = exp_of(scores[row].values[j] - base);
        sum[j] += weight;
        value[j] += weight * values[row].values[j];
      }
      top[j] = highest;
    }
  }

  // Adds the rows that another thread has added.
  __device__ void merge(const PooledRows& other) {
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      const float highest = fmaxf(top[j], other.top[j]);
      const float base = finite_base(highest);
      const float keep = exp_of(top[j] - base);
      const float take = exp_of(other.top[j] - base);
      sum[j] = keep * sum[j] + take * other.sum[j];
      value[j] = keep * value[j] + take * other.value[j];
      top[j] = highest;
    }
  }

  // The sums of another lane of the warp; every lane must call it.
  __device__ PooledRows of_lane(int lane) const {
    PooledRows other;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      other.top[j] = __shfl_sync(kFullWarp, top[j], lane);
      other.sum[j] = __shfl_sync(kFullWarp, sum[j], lane);
      other.value[j] = __shfl_sync(kFullWarp, value[j], lane);
    }
    return other;
  }

  __device__ float result(int column) const {
    return sum[column] == 0.0f ? 0.0f : __fdividef(value[column], sum[column]);
  }

  // -inf minus -inf is NaN, so while all scores are -inf they are taken relative to 0.
  __device__ static float finite_base(float highest) { return highest == -CUDART_INF_F ? 0.0f : highest; }
};

// A row that adds nothing.
__device__ inline Four<float> masked_scores() { return {{-CUDART_INF_F, -CUDART_INF_F, -CUDART_INF_F, -CUDART_INF_F}}; }

// Four neighbouring columns rounded to bfloat16.
__device__ inline void store_pooled(__nv_bfloat16* out, const PooledRows& pooled) {
  Four<__nv_bfloat16> rounded;
#pragma unroll
  for (int j = 0; j < kFour; ++j) rounded.values[j] = __float2bfloat16_rn(pooled.result(j));
  *reinterpret_cast<Four<__nv_bfloat16>*>(out) = rounded;
}

}  // namespace dsv4
