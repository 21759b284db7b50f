// The second kernel of a seam: coefficients, collapse and norm.
#pragma once

#include "device/async_copy.cuh"
#include "mhc/seam.cuh"

namespace dsv4 {

__device__ inline float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// Within an ulp, for normal values; NaN and infinity take no detour.
__device__ inline float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// The reciprocals of four sums. In pairs it is one instruction for two: 1 / a = b * (1 / (a * b)).
template <bool kInPairs>
__device__ inline void reciprocals(float (&sums)[kStreams]) {
#pragma unroll
  for (int i = 0; i < kStreams; i += 2) {
    if constexpr (kInPairs) {
      const float of_product = reciprocal(sums[i] * sums[i + 1]), first = sums[i];
      sums[i] = sums[i + 1] * of_product;
      sums[i + 1] = first * of_product;
    } else {
      sums[i] = reciprocal(sums[i]);
      sums[i + 1] = reciprocal(sums[i + 1]);
    }
  }
}

// Columns, then rows and columns by turns. The sums of the rows are taken of the products with the columns' shares as
// they are multiplied, and the other way round: a chain of dependent operations is the shorter by one.
template <bool kInPairs>
__device__ inline void divide_by_sums(float (&c)[kStreams][kStreams], int iterations, float epsilon) {
  float rows[kStreams], columns[kStreams];
#pragma unroll
  for (int k = 0; k < kStreams; ++k) columns[k] = ((c[0][k] + c[1][k]) + (c[2][k] + c[3][k])) + epsilon;
  reciprocals<kInPairs>(columns);
#pragma unroll 1
  for (int i = 1; i < iterations; ++i) {
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      rows[j] = fmaf(c[j][1], columns[1], fmaf(c[j][0], columns[0], epsilon)) +
                fmaf(c[j][3], columns[3], c[j][2] * columns[2]);
#pragma unroll
      for (int k = 0; k < kStreams; ++k) c[j][k] *= columns[k];
    }
    reciprocals<kInPairs>(rows);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      columns[k] = fmaf(c[1][k], rows[1], fmaf(c[0][k], rows[0], epsilon)) + fmaf(c[3][k], rows[3], c[2][k] * rows[2]);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) c[j][k] *= rows[j];
    }
    reciprocals<kInPairs>(columns);
  }
#pragma unroll
  for (int j = 0; j < kStreams; ++j)
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[j][k] *= columns[k];
}

// From the scaled and shifted products to C: softmax of the rows, then as above.
__device__ inline void sinkhorn(float (&c)[kStreams][kStreams], int iterations, float epsilon) {
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    const float highest = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[j][k] = expf(c[j][k] - highest);
    const float share = 1.0f / ((c[j][0] + c[j][1]) + (c[j][2] + c[j][3]));
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[j][k] = fmaf(c[j][k], share, epsilon);
  }
  // All sums are from epsilon to 4 + 4 epsilon: in this range no product of two leaves what float32 holds.
  if (epsilon > 1e-15f && epsilon < 1e15f)
    divide_by_sums<true>(c, iterations, epsilon);
  else
    divide_by_sums<false>(c, iterations, epsilon);
}

constexpr int kLineBytes = 128;
constexpr int kMostSegments = kMaxHidden / (kChunk * kWarpLanes);

// A block finishes kTokens tokens. Its last warp has their coefficients, the others kChunks chunks of a token per
// thread: the columns of a warp's chunks are neighbours.
template <Form kForm, int kTokens, int kChunks>
__global__ void __launch_bounds__(kMostFinishThreads)
    hyper_connection_finish_kernel(const __grid_constant__ Seam seam, uint32_t first_token, uint32_t end_token) {
  constexpr bool kHead = kForm == Form::kHead;
  constexpr int kRows = kRowsOf<kForm>, kRow = kRowFloats<kForm>, kQuads = kRow / 4;
  __shared__ float4 sums[kTokens == 1 ? kSumsOfToken : 1][kQuads];
  __shared__ float totals[kTokens][kRow];
  __shared__ float4 shared_pre[kTokens];
  __shared__ float squares[kTokens][kMostSegments];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int warps = blockDim.x / kWarpLanes, workers = blockDim.x - kWarpLanes;
  const bool own_pre = kCollapses<kForm> && !seam.pre_in;
  const bool normed = kCollapses<kForm> && seam.norm_weight.data;
  const bool worker = warp < warps - 1;
  const uint32_t token0 = first_token + blockIdx.x * kTokens;
  const auto column_of = [&](int i) { return (i * workers + static_cast<int>(threadIdx.x)) * kChunk; };
  // The weights are on their way into L2 while the previous kernel runs; few tokens find them in memory otherwise.
  if constexpr (kTokens == 1) {
    const auto line = static_cast<int>(threadIdx.x) * kLineBytes;
    const int weight_bytes = seam.hidden * (seam.norm_weight.is_float ? 4 : 2);
    prefetch_into_l2(static_cast<const char*>(seam.norm_weight.data) + line,
                     (blockIdx.x == 0) & normed & (line < weight_bytes));
    prefetch_into_l2(seam.base, (blockIdx.x == 0) & (threadIdx.x == 0));
    prefetch_into_l2(seam.scale, (blockIdx.x == 0) & (threadIdx.x == 0));
  }
  await_previous_grid();

  // All loads are on their way before the first of them is there.
  StreamChunks now[kChunks];
  float weight[kTokens == 1 ? kChunks : 1][kChunk];
  const auto load = [&](uint32_t token) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (column_of(i) < seam.hidden && token < end_token)
        now[i] = load_chunks(new_streams<kForm>(seam), token, column_of(i));
  };
  if constexpr (kCollapses<kForm>)
    if (worker) load(token0);

  // A lane reads a quarter row: lane / kQuads says of which sum, lane % kQuads which quarter. Sums s, s + 4 and so on are
  // added in order, then these four.
  constexpr int kLaneSums = kWarpLanes / kQuads;
  static_assert(kLaneSums % 4 == 0);
  const int own_sum = lane / kQuads, quad = lane % kQuads;
  const auto add_four = [&](float4 sum) {
#pragma unroll
    for (int distance = kQuads; distance < 4 * kQuads; distance *= 2) {
      sum.x += __shfl_xor_sync(kFullWarp, sum.x, distance);
      sum.y += __shfl_xor_sync(kFullWarp, sum.y, distance);
      sum.z += __shfl_xor_sync(kFullWarp, sum.z, distance);
      sum.w += __shfl_xor_sync(kFullWarp, sum.w, distance);
    }
    return sum;
  };
  const auto rows = [&](uint32_t token) {
    return reinterpret_cast<float4*>(seam.row_of(token - first_token, 0, kRow)) + quad;
  };
  float base[kStreams * kStreams], comb_scale = 0.0f, own_base = 0.0f, own_scale = 0.0f;
  const auto load_base = [&] {
    constexpr int kSigmoids = kHead ? kStreams : 2 * kStreams;
    own_base = __ldg(seam.base + lane % kSigmoids), own_scale = __ldg(seam.scale + lane % kSigmoids / kStreams);
    if constexpr (!kHead) {
      comb_scale = __ldg(seam.scale + 2);
#pragma unroll
      for (int i = 0; i < kStreams * kStreams; ++i) base[i] = __ldg(seam.base + 2 * kStreams + i);
    }
  };
  if constexpr (kTokens == 1) {
    for (int s = warp * kLaneSums + own_sum; s < kSumsOfToken; s += warps * kLaneSums) {
      constexpr int kMost = kMaxHidden / kUnitColumns / kSumsOfToken;
      const int begin = s * seam.sum_slices, count = min(seam.slices - begin, seam.sum_slices);
      float4* const place = rows(token0) + begin * kQuads;
      float4 of[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (i < count) of[i] = place[i * kQuads];
      float4 sum = {};
      if (count > 0) sum = of[0];
#pragma unroll
      for (int i = 1; i < kMost; ++i)
        if (i < count) sum += of[i];
#pragma unroll
      for (int i = 0; i < kMost; ++i)
        if (i < count) place[i * kQuads] = {};
      sums[s][quad] = sum;
    }
    if (!worker) load_base();
    if constexpr (kCollapses<kForm>) {
      if (worker && normed) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
          if (column_of(i) < seam.hidden) seam.norm_weight.load(column_of(i), weight[i]);
      }
    }
    __syncthreads();
    if (!worker) {
      float4 sum = sums[own_sum % 4][quad];
#pragma unroll
      for (int s = 4; s < kSumsOfToken; s += 4) sum += sums[s + own_sum % 4][quad];
      reinterpret_cast<float4*>(totals[0])[quad] = add_four(sum);
      __syncwarp();
    }
  } else {
    if (!worker) load_base();
    for (int t = warp; t < kTokens; t += warps) {
      if (token0 + t >= end_token) break;
      float4* const place = rows(token0 + t);
      float4 sum;
      if (seam.sum_slices == 1) {
        float4 of[kSumsOfToken / 4];
#pragma unroll
        for (int s = 0; s < kSumsOfToken / 4; ++s) {
          of[s] = {};
          if (const int slice = s * 4 + own_sum % 4; slice < seam.slices) of[s] = place[slice * kQuads];
        }
        sum = of[0];
#pragma unroll
        for (int s = 1; s < kSumsOfToken / 4; ++s) sum += of[s];
      } else {  // one row after the other: no registers for the rows of all sums
#pragma unroll 1
        for (int s = own_sum % 4; s < kSumsOfToken; s += 4) {
          float4 one = {};
#pragma unroll 1
          for (int slice = s * seam.sum_slices; slice < min(seam.slices, (s + 1) * seam.sum_slices); ++slice)
            one += place[slice * kQuads];
          if (s < 4)
            sum = one;
          else
            sum += one;
        }
      }
      reinterpret_cast<float4*>(totals[t])[quad] = add_four(sum);
      __syncwarp();  // other lanes have read them
      for (int slice = own_sum; slice < seam.slices; slice += kLaneSums) place[slice * kQuads] = {};
    }
    __syncthreads();
  }
  if (!worker) {
    constexpr int kSigmoids = kHead ? kStreams : 2 * kStreams;  // pre and post
    const auto root_of = [&](int t) { return rsqrtf(fmaf(totals[t][kRows], seam.reciprocal_width, seam.epsilon)); };
#pragma unroll
    for (int i = 0; i < kTokens * kSigmoids; i += kWarpLanes) {
      const int t = (i + lane) / kSigmoids, value = lane % kSigmoids;
      if (t >= kTokens || token0 + t >= end_token) continue;
      const float share = sigmoid(fmaf(totals[t][value] * root_of(t), own_scale, own_base));
      const bool is_pre = value < kStreams;
      const float result = is_pre ? share + seam.hc_epsilon : share * seam.post_factor;
      if (is_pre) reinterpret_cast<float*>(&shared_pre[t])[value] = result;
      if constexpr (!kHead)
        (is_pre ? seam.out_pre : seam.out_post)[static_cast<int64_t>(token0 + t) * kStreams + value % kStreams] =
            result;
    }
    __syncwarp();
    if (own_pre) asm volatile("bar.arrive 1, %0;" ::"r"(blockDim.x) : "memory");
    if constexpr (!kHead) {
      const int t = min(lane % kTokens, static_cast<int>(end_token - token0) - 1);
      const float root = root_of(t);
      float c[kStreams][kStreams];
#pragma unroll
      for (int i = 0; i < kStreams * kStreams; ++i)
        c[i / kStreams][i % kStreams] = fmaf(totals[t][2 * kStreams + i] * root, comb_scale, base[i]);
      sinkhorn(c, seam.iterations, seam.hc_epsilon);
      if (lane < kTokens && token0 + t < end_token) {
#pragma unroll
        for (int j = 0; j < kStreams; ++j)
          reinterpret_cast<float4*>(seam.out_comb)[static_cast<int64_t>(token0 + t) * kStreams + j] =
              reinterpret_cast<const float4&>(c[j]);
      }
    }
    return;
  }
  if constexpr (kCollapses<kForm>) {
    if (own_pre) asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory");
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      const uint32_t token = token0 + t;
      if (token >= end_token) break;
      const float4 pre = own_pre ? shared_pre[t] : __ldg(seam.pre_in + token);
      uint4 u[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        float square = 0.0f;
        u[i] = {};
        if (column_of(i) < seam.hidden) u[i] = collapse(now[i], pre, seam.norm_unrounded, &square);
        square = sum_over_group(square, kWarpLanes);
        if (lane == 0) squares[t][i * (warps - 1) + warp] = square;
      }
      if (t + 1 < kTokens) load(token + 1);
      float root = 1.0f;
      if (normed) {
        asm volatile("bar.sync 2, %0;" ::"r"(workers) : "memory");
        const int segments = (seam.hidden + kChunk * kWarpLanes - 1) / (kChunk * kWarpLanes);
        const float square = sum_over_group(lane < segments ? squares[t][lane] : 0.0f, kWarpLanes);
        root = rsqrtf(fmaf(square, seam.reciprocal_hidden, seam.epsilon));
      }
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int column = column_of(i);
        if (column >= seam.hidden) break;
        if (normed) {
          if constexpr (kTokens > 1) {
            float now_weight[kChunk];
            seam.norm_weight.load(column, now_weight);
            u[i] = normalize(u[i], root, now_weight);
          } else {
            u[i] = normalize(u[i], root, weight[i]);
          }
        }
        *reinterpret_cast<uint4*>(seam.out_layer_input + static_cast<int64_t>(token) * seam.hidden + column) = u[i];
      }
    }
  }
}

}  // namespace dsv4
