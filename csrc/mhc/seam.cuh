// The kernel of a seam, the place between two sublayers: update, projection, Sinkhorn, collapse and norm in one launch.
//
// A cluster of 8 blocks has 8 to 32 tokens, each block an eighth of the columns of all four streams. A token's new
// streams stay in shared memory from the update to the norm, in the place of the thread that computed them. In three
// exchanges over distributed shared memory the blocks add up what concerns all columns: the products with fn, pre, and
// the squares of the collapsed columns. The sums of one token meet in one block, where a warp of its own has its
// coefficients. That warp sends pre to all blocks as soon as it is known; the Sinkhorn iterations then run beside
// collapse and norm.
//
// The product: a lane's 8 columns of a token are, as they lie in memory, the second operand of two tensor core
// products. Of fn, it loads the same columns of three rows and splits each value in three bfloat16 terms: the upper 8
// bits of its significand, the next 8, the rest. So the products are those of float32; the sums are the tensor cores'.
//
// The order of all sums depends on `hidden` alone: 16 segments of the columns, in each up to 7 warps that take units of
// 32 columns in turn. Warps are added in order, then segments.
#pragma once

#include "device/async_copy.cuh"
#include "device/cluster.cuh"
#include "device/mma.cuh"
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
  uint32_t tokens;
  int hidden;
  SeamColumns columns;
  float reciprocal_width, reciprocal_hidden;  // of a token's streams, and of one
  float epsilon, hc_epsilon, post_factor;
  int iterations;
  bool norm_unrounded;
};

template <Form kForm>
constexpr int kRowsOf = kForm == Form::kHead ? kStreams : 24;  // of fn
template <Form kForm>
constexpr int kValuesOf = kRowsOf<kForm> + 1;  // of a token: the products, and the sum of squares
constexpr int kWorkerWarps = kSegmentsOfBlock * kMostSegmentWarps;
constexpr int kSeamThreads = (kWorkerWarps + 1) * kWarpLanes;
constexpr int kRowPad = kSegments + 4;  // floats from token to token, so that lanes that read four meet no bank twice

// What the blocks of a cluster hand to this one.
template <int Groups, int Values>
struct Exchange {
  static constexpr int kTokens = Groups * kGroupTokens;

  float sums[kSegments][Groups][Values];  // of the tokens that this block has the coefficients of
  float totals[Groups][Values];
  alignas(16) float pre[kTokens][kStreams];
  alignas(16) float squares[kTokens][kRowPad];
  float squares_of_warp[kWorkerWarps][kTokens];
  ByteBarrier sums_complete, pre_complete, squares_complete;
};

// The barrier of the warps that have columns; the one that has the coefficients takes no part in it.
__device__ inline void synchronize_workers(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

__device__ inline float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// Within an ulp, for normal values; NaN and infinity take no detour.
__device__ inline float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// From the scaled and shifted products to C: softmax of the rows, then rows and columns by turns, columns first and
// last.
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
  const auto divide_columns = [&] {
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float share = reciprocal(((c[0][k] + c[1][k]) + (c[2][k] + c[3][k])) + epsilon);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) c[j][k] *= share;
    }
  };
  divide_columns();
#pragma unroll 1
  for (int i = 1; i < iterations; ++i) {
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      const float share = reciprocal(((c[j][0] + c[j][1]) + (c[j][2] + c[j][3])) + epsilon);
#pragma unroll
      for (int k = 0; k < kStreams; ++k) c[j][k] *= share;
    }
    divide_columns();
  }
}

constexpr int kTerms = 3;

// Four neighbouring values of a row of fn as three rows of bfloat16 pairs, whose sum they are.
struct SplitValues {
  uint32_t term[kTerms][2];
};

__device__ inline SplitValues split(const float4& values) {
  SplitValues result;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float low = i ? values.z : values.x, high = i ? values.w : values.y;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      const uint32_t low_bits = __float_as_uint(low), high_bits = __float_as_uint(high);
      result.term[t][i] = __byte_perm(low_bits, high_bits, 0x7632);
      low -= __uint_as_float(low_bits & 0xffff0000u);
      high -= __uint_as_float(high_bits & 0xffff0000u);
    }
  }
  return result;
}

// A lane's part of fn: four neighbouring columns, two for each half of a product, of rows lane / 4, + 8, + 16.
template <int Rows>
struct FnValues {
  static constexpr int kLoaded = Rows == 24 ? 3 : 1;
  float4 row[kLoaded];

  __device__ void load(const float* __restrict__ fn, uint32_t width, uint32_t column, uint32_t first_row, bool exists) {
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      const bool read = exists && first_row + 8 * i < Rows;
      row[i] = read ? __ldg(reinterpret_cast<const float4*>(fn + (first_row + 8 * i) * width + column)) : float4{};
    }
  }
};

// Adds the products of a group of tokens with what split() made of FnValues.
template <int Rows>
__device__ inline void add_products(float (&sums)[2][4], const SplitValues (&rows)[FnValues<Rows>::kLoaded],
                                    const uint2& tokens) {
  if constexpr (Rows == 24) {
#pragma unroll
    for (int t = 0; t < kTerms; ++t)
      multiply_add(sums[0], rows[0].term[t][0], rows[1].term[t][0], rows[0].term[t][1], rows[1].term[t][1], tokens.x,
                   tokens.y);
  }
  // The last eight rows, or the head's four: the first term above the second, then the third.
  const SplitValues& last = rows[FnValues<Rows>::kLoaded - 1];
  multiply_add(sums[1], last.term[0][0], last.term[1][0], last.term[0][1], last.term[1][1], tokens.x, tokens.y);
  multiply_add(sums[1], last.term[2][0], 0, last.term[2][1], 0, tokens.x, tokens.y);
}

__device__ inline void add_square(uint32_t pair, float* sum) {
  *sum = fmaf(low_half(pair), low_half(pair), *sum);
  *sum = fmaf(high_half(pair), high_half(pair), *sum);
}

template <Form kForm, int Groups>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kSeamThreads, 1)
    hyper_connection_kernel(const __grid_constant__ Seam seam) {
  await_previous_grid();
  constexpr bool kUpdates = kForm == Form::kPostPre, kCollapses = kForm != Form::kCoefficients;
  constexpr bool kHead = kForm == Form::kHead;
  constexpr int kRows = kRowsOf<kForm>, kValues = kValuesOf<kForm>, kTokens = Groups * kGroupTokens;
  extern __shared__ uint4 dynamic[];
  __shared__ Exchange<Groups, kValues> exchange;
  const uint32_t rank = blockIdx.x % kClusterBlocks;
  const uint32_t first_token = blockIdx.x / kClusterBlocks * kTokens;
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int warps = seam.columns.segment_warps, rounds = seam.columns.rounds;
  const int worker_warps = kSegmentsOfBlock * warps, worker_threads = worker_warps * kWarpLanes;
  const bool own_pre = kCollapses && !seam.pre_in;
  const bool normed = kCollapses && seam.norm_weight.data;
  // A warp's part of the dynamic memory: streams [round][group][stream][lane], then x [round][group][lane], and in the
  // place of x, once it was added, the warp's sums [group][value][token].
  const int chunks_of_warp = rounds * Groups * kWarpLanes;
  const uint32_t scratch_chunks = seam_scratch_bytes(seam.columns, Groups, kValues) / sizeof(uint4);
  uint4* const chunks = dynamic + warp * (kStreams * chunks_of_warp + scratch_chunks) + lane;
  const auto stream_chunk = [&](int round, int group, int stream) -> uint4& {
    return chunks[((round * Groups + group) * kStreams + stream) * kWarpLanes];
  };
  const auto x_chunk = [&](int round, int group) -> uint4& {
    return chunks[kStreams * chunks_of_warp + (round * Groups + group) * kWarpLanes];
  };

  if (threadIdx.x == 0) {
    expect_bytes(&exchange.sums_complete, sizeof(exchange.sums));
    if (own_pre) expect_bytes(&exchange.pre_complete, sizeof(exchange.pre));
    if (normed) expect_bytes(&exchange.squares_complete, kTokens * kSegments * sizeof(float));
  }
  __cluster_barrier_arrive_relaxed();

  if (warp == worker_warps) {  // the coefficients of the tokens that this block has them of: group g's token `rank`
    float base[kStreams * kStreams], comb_scale = 0.0f;
    if constexpr (!kHead) {
      comb_scale = __ldg(seam.scale + 2);
#pragma unroll
      for (int i = 0; i < kStreams * kStreams; ++i) base[i] = __ldg(seam.base + 2 * kStreams + i);
    }
    constexpr int kSigmoids = kHead ? kStreams : 2 * kStreams;  // of a token: pre and post
    const int group = lane / kSigmoids, value = lane % kSigmoids;
    const float own_base = __ldg(seam.base + value), own_scale = __ldg(seam.scale + value / kStreams);
    __cluster_barrier_wait();
    wait_for_bytes(&exchange.sums_complete);
    for (int i = lane; i < Groups * kValues; i += kWarpLanes) {
      const int g = i / kValues, v = i % kValues;
      float quarter[4] = {};
#pragma unroll
      for (int s = 0; s < kSegments; ++s) quarter[s % 4] += exchange.sums[s][g][v];
      exchange.totals[g][v] = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
    }
    __syncwarp();
    const auto scale_of = [&](int g) {
      return rsqrtf(fmaf(exchange.totals[g][kRows], seam.reciprocal_width, seam.epsilon));
    };
    const auto token_of = [&](int g) { return g * kGroupTokens + static_cast<int>(rank); };
    if (group < Groups) {
      const int token = token_of(group);
      const float share = sigmoid(fmaf(exchange.totals[group][value] * scale_of(group), own_scale, own_base));
      const bool is_pre = value < kStreams;
      const float result = is_pre ? share + seam.hc_epsilon : share * seam.post_factor;
      if (is_pre && own_pre)
#pragma unroll
        for (uint32_t block = 0; block < kClusterBlocks; ++block)
          store_to_block(&exchange.pre[token][value], result, &exchange.pre_complete, block);
      if constexpr (!kHead)
        if (first_token + token < seam.tokens)
          (is_pre ? seam.out_pre
                  : seam.out_post)[static_cast<int64_t>(first_token + token) * kStreams + value % kStreams] = result;
    }
    if constexpr (!kHead) {
      const int g = lane % Groups;
      const float scale = scale_of(g);
      float c[kStreams][kStreams];
#pragma unroll
      for (int i = 0; i < kStreams * kStreams; ++i)
        c[i / kStreams][i % kStreams] = fmaf(exchange.totals[g][2 * kStreams + i] * scale, comb_scale, base[i]);
      sinkhorn(c, seam.iterations, seam.hc_epsilon);
      const uint32_t token = first_token + token_of(g);
      if (lane < Groups && token < seam.tokens) {
#pragma unroll
        for (int j = 0; j < kStreams; ++j)
          reinterpret_cast<float4*>(seam.out_comb)[static_cast<int64_t>(token) * kStreams + j] =
              reinterpret_cast<const float4&>(c[j]);
      }
    }
    return;
  }

  // A worker: token lane / 4 of each group, 8 columns of each unit.
  const int segment = warp / warps, segment_warp = warp % warps;
  const int segment_unit = (rank * kSegmentsOfBlock + segment) * seam.columns.segment_units;
  const auto column_of = [&](int round) {
    const int unit = segment_warp + round * warps;
    return unit < seam.columns.segment_units ? (segment_unit + unit) * kUnitColumns + lane % 4 * kChunk
                                             : 2 * kMaxHidden;
  };
  const auto token_of = [&](int group) { return first_token + group * kGroupTokens + lane / 4; };
  const uint32_t width = seam.hidden * kStreams;

  // A small batch finds fn in memory, not in L2, and little else to do: it is on its way while the streams are.
  if constexpr (Groups == 1) {
    for (int round = 0; round < rounds; ++round) {
      const int column = column_of(round) - lane % 4 * kChunk;
      if (column >= seam.hidden) continue;
      for (int i = lane; i < kRows * kStreams; i += kWarpLanes) {
        const float* const line = seam.fn + i / kStreams * width + i % kStreams * seam.hidden + column;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
      }
    }
  }

  // All that the thread reads is on its way before the first of it is there.
#pragma unroll
  for (int group = 0; group < Groups; ++group) {
    const uint32_t token = token_of(group);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int column = column_of(round);
      const bool exists = token < seam.tokens && column < seam.hidden;
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        uint4& place = stream_chunk(round, group, j);
        if (exists)
          copy_async(&place, seam.streams.chunk(token, j, column));
        else
          place = {};
      }
      if constexpr (kUpdates)
        if (exists) copy_async(&x_chunk(round, group), seam.update.chunk_of_x(token, column));
    }
    commit_copies();
  }
  if constexpr (kUpdates) {
#pragma unroll
    for (int group = 0; group < Groups; ++group) {
      const uint32_t token = token_of(group);
      UpdateCoefficients by = {};
      if (token < seam.tokens) by = load_coefficients(seam.update, token);
      wait_for_copies(Groups - 1 - group);
#pragma unroll 1
      for (int round = 0; round < rounds; ++round) {
        const int column = column_of(round);
        if (token >= seam.tokens || column >= seam.hidden) break;
        StreamChunks chunks;
#pragma unroll
        for (int j = 0; j < kStreams; ++j) chunks.of[j] = stream_chunk(round, group, j);
        chunks = update(chunks, x_chunk(round, group), by);
        store_chunks(seam.out_streams, token, column, chunks);
#pragma unroll
        for (int k = 0; k < kStreams; ++k) stream_chunk(round, group, k) = chunks.of[k];
      }
    }
  } else {
    wait_for_copies(0);
  }

  float sums[Groups][2][4] = {}, squares[Groups] = {};
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int column = column_of(round);
    if (column - lane % 4 * kChunk >= seam.hidden) break;  // none of the warp's columns exists
#pragma unroll(Groups <= 2 ? 4 : 2)
    for (int half_chunk = 0; half_chunk < 2 * kStreams; ++half_chunk) {
      const int j = half_chunk / 2, half = half_chunk % 2;
      FnValues<kRows> fn;
      fn.load(seam.fn, width, j * seam.hidden + column + half * kChunk / 2, lane / 4, column < seam.hidden);
      SplitValues rows[FnValues<kRows>::kLoaded];
#pragma unroll
      for (int i = 0; i < FnValues<kRows>::kLoaded; ++i) rows[i] = split(fn.row[i]);
#pragma unroll
      for (int group = 0; group < Groups; ++group) {
        const uint2 tokens = reinterpret_cast<const uint2*>(&stream_chunk(round, group, j))[half];
        add_products<kRows>(sums[group], rows, tokens);
        add_square(tokens.x, &squares[group]);
        add_square(tokens.y, &squares[group]);
      }
    }
  }

  // The sums of this warp, then of this segment, which go to the block that has the token's coefficients.
  const auto warp_sum = [&](int of_warp, int group, int value, int token) -> float& {
    uint4* const scratch = dynamic + of_warp * (kStreams * chunks_of_warp + scratch_chunks) + kStreams * chunks_of_warp;
    return reinterpret_cast<float*>(scratch)[(group * kValues + value) * kGroupTokens + token];
  };
  __syncwarp();  // the warp has read its x
#pragma unroll
  for (int group = 0; group < Groups; ++group) {
    const int row = lane / 4, token = lane % 4 * 2;
    const auto put = [&](int value, float first, float second) {
      reinterpret_cast<float2&>(warp_sum(warp, group, value, token)) = {first, second};
    };
    const auto& of = sums[group];
    if constexpr (kHead) {
      if (row < kRows) put(row, of[1][0] + of[1][2], of[1][1] + of[1][3]);
    } else {
      put(row, of[0][0], of[0][1]);
      put(row + 8, of[0][2], of[0][3]);
      put(row + 16, of[1][0] + of[1][2], of[1][1] + of[1][3]);
    }
    const float square = sum_over_group(squares[group], 4);
    if (lane % 4 == 0) warp_sum(warp, group, kRows, lane / 4) = square;
  }
  __cluster_barrier_wait();  // every block can receive
  synchronize_workers(worker_threads);
  for (int i = threadIdx.x; i < kSegmentsOfBlock * Groups * kValues * kGroupTokens; i += worker_threads) {
    const int token = i % kGroupTokens, value = i / kGroupTokens % kValues;
    const int group = i / (kGroupTokens * kValues) % Groups, s = i / (kGroupTokens * kValues * Groups);
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += warp_sum(s * warps + w, group, value, token);
    store_to_block(&exchange.sums[rank * kSegmentsOfBlock + s][group][value], sum, &exchange.sums_complete, token);
  }
  if constexpr (!kCollapses) return;

  float weight[kChunk] = {};
  if (normed && column_of(0) < seam.hidden) seam.norm_weight.load(column_of(0), weight);
  if (own_pre) wait_for_bytes(&exchange.pre_complete);
  const auto place = [&](uint32_t token, int column) {
    return reinterpret_cast<uint4*>(seam.out_layer_input + static_cast<int64_t>(token) * seam.hidden + column);
  };
#pragma unroll 1
  for (int group = 0; group < Groups; ++group) {
    const uint32_t token = token_of(group);
    float4 pre = {};
    if (own_pre)
      pre = reinterpret_cast<const float4&>(exchange.pre[group * kGroupTokens + lane / 4]);
    else if (token < seam.tokens)
      pre = __ldg(seam.pre_in + token);
    float square = 0.0f;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int column = column_of(round);
      StreamChunks now;
#pragma unroll
      for (int j = 0; j < kStreams; ++j) now.of[j] = stream_chunk(round, group, j);
      const uint4 u = collapse(now, pre, seam.norm_unrounded, &square);
      if (normed)
        stream_chunk(round, group, 0) = u;
      else if (token < seam.tokens && column < seam.hidden)
        *place(token, column) = u;
    }
    square = sum_over_group(square, 4);
    if (lane % 4 == 0) exchange.squares_of_warp[warp][group * kGroupTokens + lane / 4] = square;
  }
  if (!normed) return;

  synchronize_workers(worker_threads);
  for (int i = threadIdx.x; i < kSegmentsOfBlock * kTokens * kClusterBlocks; i += worker_threads) {
    const uint32_t block = i % kClusterBlocks;
    const int token = i / kClusterBlocks % kTokens, s = i / (kClusterBlocks * kTokens);
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += exchange.squares_of_warp[s * warps + w][token];
    store_to_block(&exchange.squares[token][rank * kSegmentsOfBlock + s], sum, &exchange.squares_complete, block);
  }
  wait_for_bytes(&exchange.squares_complete);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int column = column_of(round);
    if (column >= seam.hidden) break;
    if (round > 0) seam.norm_weight.load(column, weight);
#pragma unroll 1
    for (int group = 0; group < Groups; ++group) {
      const uint32_t token = token_of(group);
      if (token >= seam.tokens) break;
      float quarter[4] = {};
#pragma unroll
      for (int s = 0; s < kSegments; s += 4) {
        const float4 four = reinterpret_cast<const float4&>(exchange.squares[group * kGroupTokens + lane / 4][s]);
        quarter[s / 4] = (four.x + four.y) + (four.z + four.w);
      }
      const float square = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
      const float root = rsqrtf(fmaf(square, seam.reciprocal_hidden, seam.epsilon));
      *place(token, column) = normalize(stream_chunk(round, group, 0), root, weight);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ the host

// Checks of fn, base and scale, and what the kernel takes of them.
inline void check_projection(Check& check, const dsv4_tensor& fn, const dsv4_tensor& base, const dsv4_tensor& scale,
                             int64_t rows, int64_t scales, int64_t hidden, float epsilon, float hc_epsilon) {
  check.tensor("fn", fn, one_of(DSV4_FLOAT32), {rows, saturating_product(kStreams, hidden)});
  check.aligned_rows("fn", fn, sizeof(float4));
  check.tensor("base", base, one_of(DSV4_FLOAT32), {rows});
  check.tensor("scale", scale, one_of(DSV4_FLOAT32), {scales});
  check.number("epsilon", epsilon, 0.0f);
  check.number("hc_epsilon", hc_epsilon, FLT_MIN);
}

inline void check_coefficients(Check& check, const dsv4_tensor& out_pre, const dsv4_tensor& out_post,
                               const dsv4_tensor& out_comb, float post_factor, int32_t iterations, int64_t tokens) {
  check.number("post_factor", post_factor, 0.0f);
  check.range("sinkhorn_iterations", iterations, 1, 1000);
  check.tensor("out_pre", out_pre, one_of(DSV4_FLOAT32), {tokens, kStreams});
  check.tensor("out_post", out_post, one_of(DSV4_FLOAT32), {tokens, kStreams});
  check.tensor("out_comb", out_comb, one_of(DSV4_FLOAT32), {tokens, kStreams, kStreams});
  check.aligned_rows("out_comb", out_comb, sizeof(float4));
}

inline void check_layer_input(Check& check, const char* name, const dsv4_tensor& out, int64_t tokens, int64_t hidden) {
  check.tensor(name, out, one_of(DSV4_BFLOAT16), {tokens, hidden});
  check.aligned_rows(name, out, sizeof(uint4));
}

inline void check_pre_in(Check& check, const dsv4_tensor& pre_in, int64_t tokens) {
  check.optional_tensor("pre_in", pre_in, one_of(DSV4_FLOAT32), {tokens, kStreams});
  if (present(pre_in)) check.aligned_rows("pre_in", pre_in, sizeof(float4));
}

inline void set_streams(Seam& seam, const dsv4_tensor& streams) {
  seam.streams = streams_of(streams);
  seam.tokens = static_cast<uint32_t>(streams.shape[0]);
  seam.hidden = static_cast<int>(streams.shape[2]);
  seam.columns = seam_columns(seam.hidden);
  seam.reciprocal_hidden = 1.0f / static_cast<float>(seam.hidden);
  seam.reciprocal_width = 1.0f / static_cast<float>(seam.hidden * kStreams);
}

inline void set_projection(Seam& seam, const dsv4_tensor& fn, const dsv4_tensor& base, const dsv4_tensor& scale,
                           float epsilon, float hc_epsilon) {
  seam.fn = static_cast<const float*>(fn.data);
  seam.base = static_cast<const float*>(base.data);
  seam.scale = static_cast<const float*>(scale.data);
  seam.epsilon = epsilon;
  seam.hc_epsilon = hc_epsilon;
}

inline void set_coefficients(Seam& seam, const dsv4_tensor& out_pre, const dsv4_tensor& out_post,
                             const dsv4_tensor& out_comb, float post_factor, int32_t iterations) {
  seam.out_pre = static_cast<float*>(out_pre.data);
  seam.out_post = static_cast<float*>(out_post.data);
  seam.out_comb = static_cast<float*>(out_comb.data);
  seam.post_factor = post_factor;
  seam.iterations = iterations;
}

inline void set_layer_input(Seam& seam, const dsv4_tensor& norm_weight, const dsv4_tensor& out,
                            int32_t norm_unrounded) {
  seam.norm_weight = norm_weight_of(norm_weight);
  seam.out_layer_input = static_cast<__nv_bfloat16*>(out.data);
  seam.norm_unrounded = norm_unrounded != 0;
}

template <Form kForm, int Groups>
dsv4_status launch_seam_of(const LaunchTarget& target, const Seam& seam) {
  const uint32_t clusters = blocks_for(seam.tokens, Groups * kGroupTokens);
  const uint32_t threads = (kSegmentsOfBlock * seam.columns.segment_warps + 1) * kWarpLanes;
  const auto shared = static_cast<uint32_t>(seam_shared_bytes(seam.columns, Groups, kValuesOf<kForm>));
  return launch<hyper_connection_kernel<kForm, Groups>>(target, {clusters * kClusterBlocks, threads, shared}, seam);
}

template <Form kForm>
dsv4_status launch_seam(const LaunchTarget& target, const Seam& seam) {
  constexpr int kValues = kValuesOf<kForm>;
  const SeamPolicy policy =
      seam_policy(*target.device, seam.tokens, seam.hidden, kValues, sizeof(Exchange<kMostGroups, kValues>));
  switch (policy.groups) {
    case 1: return launch_seam_of<kForm, 1>(target, seam);
    case 2: return launch_seam_of<kForm, 2>(target, seam);
    case 3: return launch_seam_of<kForm, 3>(target, seam);
    default: return launch_seam_of<kForm, 4>(target, seam);
  }
}

}  // namespace dsv4
