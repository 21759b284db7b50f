// The grouped product of few tiles of 16 rows with interleaved FP4 weights (python/dsv4_kernels/moe/
// interleaved_weights.py): a step of a few tokens, which is a matter of reading weights as fast as memory gives them.
//
// The weights of all tiles are one list of groups of 16 weight rows. Every block of threads takes an equal stretch of
// it, whatever tiles that touches, and its warps take units of it in turn: a group's weights of 256 inner positions,
// loaded as the tensor cores want them, two units ahead. A unit's sums go to shared memory, where those of a group are
// added up in the order of the inner positions. So a result does not depend on which warp or block computed which part
// of it.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "core/launch.h"
#include "device/reduce.cuh"
#include "moe/few_tiles.h"

namespace dsv4 {

static_assert(kFewTiles <= kWarpLanes, "a lane knows a tile");
constexpr int kGroupRows = 16;   // weight rows of a unit: with SwiGLU 8 of the gate and the same 8 of up
constexpr int kUnitBlocks = 2;   // blocks of inner positions of a unit
constexpr int kPassRows = 4;     // rows of a tile that are multiplied at a time
constexpr int kBatchUnits = 64;  // whose sums shared memory holds, twice: one batch is added up beside the next
constexpr int kUnitSums = kGroupRows * kPassRows;
constexpr float kLeftOver = 256.0f;  // of the bias of the weights' factors
constexpr int kRowPadding = 32;      // elements behind a row in shared memory: two rows' loads meet in no bank

// 8 codes of a word times their factors, as four pairs of bfloat16: aot/moe/device/interleaved_weights.py says how.
__device__ __forceinline__ void widen(uint32_t word, uint32_t first, uint32_t second, uint32_t (&pairs)[4]) {
  asm("{\n"
      ".reg .b32 a, b, c, d;\n"
      "and.b32 a, %4, 0x81C081C0;\n"
      "shf.r.wrap.b32 b, %4, %4, 3;\n"
      "and.b32 b, b, 0x81C081C0;\n"
      "shf.r.wrap.b32 c, %4, %4, 6;\n"
      "and.b32 c, c, 0x81C081C0;\n"
      "and.b32 d, %4, 0x001B001B;\n"
      "mul.lo.u32 d, d, 0x4108;\n"
      "and.b32 d, d, 0x81C081C0;\n"
      "mul.rn.bf16x2 %0, a, %5;\n"
      "mul.rn.bf16x2 %1, b, %5;\n"
      "mul.rn.bf16x2 %2, c, %6;\n"
      "mul.rn.bf16x2 %3, d, %6;\n"
      "}"
      : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
      : "r"(word), "r"(first), "r"(second));
}

// sums [16 x 8] += 16 weight rows x 16 inner positions, of this lane's fragments.
__device__ __forceinline__ void multiply_add(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

__device__ __forceinline__ uint2 load_once(const uint2* from) {
  uint2 value;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  return value;
}

// x / (1 + 2^(-x log2(e))); a quotient below 2^-126 is 0.
__device__ __forceinline__ float fast_silu(float x) {
  float result;
  asm("{\n"
      ".reg .f32 t;\n"
      "mul.f32 t, %1, 0fBFB8AA3B;\n"
      "ex2.approx.ftz.f32 t, t;\n"
      "add.f32 t, t, 0f3F800000;\n"
      "rcp.approx.ftz.f32 t, t;\n"
      "mul.f32 %0, %1, t;\n"
      "}"
      : "=f"(result)
      : "f"(x));
  return result;
}

// A lane's weights of a block of inner positions: 4 words of rows lane / 4 and lane / 4 + 8, and those rows' factors.
template <int Factors>
struct Fragment {
  uint4 words[2];
  std::conditional_t<Factors == 2, uint2, uint4> factors[2];
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ uint32_t word_of(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

// The sums of a block of inner positions, in two parts so that one product need not wait for the other. x: this lane's
// in shared memory.
template <int Factors>
__device__ __forceinline__ void multiply_block(float (&sums)[2][4], const Fragment<Factors>& w, const uint4* x) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int group = word / 2, half = word % 2;
    uint32_t pairs[2][4];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t first = word_of(w.factors[row], Factors == 2 ? group : 2 * group);
      const uint32_t second = word_of(w.factors[row], Factors == 2 ? group : 2 * group + 1);
      const uint32_t which = half ? 0x3232 : 0x1010;
      widen(word_of(w.words[row], word), __byte_perm(first, 0, which), __byte_perm(second, 0, which), pairs[row]);
    }
    const uint4 b = x[word * 4];
    multiply_add(sums[0], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
    multiply_add(sums[1], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z, b.w);
  }
}

struct FewTilesRow {
  int32_t number;  // or -1: the row is padding
  float weight;
  float factor, up_factor;  // of sums, of the gate's or all and of up's
};

// Bytes of dynamic shared memory: rows of x, and sums of two batches. The same for every product: a multiprocessor must
// run empty to divide its memory in another way.
constexpr uint32_t kFewTilesShared = kPassRows * (kFewTilesInner + kRowPadding) * 2 + 2 * kBatchUnits * kUnitSums * 4;

// Some groups of one pass, whose units the warps take in turn.
struct Batch {
  int32_t first;   // group, of this block's stretch
  int32_t groups;  // of the batch
  int32_t group;   // the first one, of its pass
  int32_t pass;
};

template <int Factors, bool SwiGlu, int Warps, int Blocks>
__global__ void __launch_bounds__(Warps* kWarpLanes, Blocks) moe_few_tiles_kernel(FewTiles p) {
  await_previous_grid();
  constexpr int kThreads = Warps * kWarpLanes;
  constexpr int kRowParts = (kFewTilesInner / 8 + kThreads - 1) / kThreads;  // of a row, which each thread moves
  extern __shared__ uint4 shared[];
  __shared__ FewTilesRow rows[kPassRows];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;

  // Every warp knows every tile: its expert, and how often kPassRows rows cover those it has.
  int32_t expert = -1, passes = 0;
  if (lane < p.tiles) {
    expert = p.tile_to_expert[lane];
#pragma unroll
    for (int i = 0; i < kTileRows; ++i)
      if (p.row_to_slot[lane * kTileRows + i] >= 0) passes = i / kPassRows + 1;
    if (expert < 0 || expert >= p.experts) passes = 0;
  }
  int32_t passes_up_to = passes;
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, passes_up_to, distance);
    if (lane >= distance) passes_up_to += below;
  }
  auto tile_of = [&](int32_t pass) { return __popc(__ballot_sync(kFullWarp, passes_up_to <= pass)); };

  // This block's groups of weight rows: a stretch of the list of all passes' groups.
  const uint32_t groups_of_pass = p.weight_rows / kGroupRows;
  const uint32_t all_groups = __shfl_sync(kFullWarp, passes_up_to, kWarpLanes - 1) * groups_of_pass;
  const uint32_t share = all_groups / gridDim.x, rest = all_groups % gridDim.x;
  const int32_t own_groups = share + (blockIdx.x < rest);
  if (own_groups == 0) return;
  const uint32_t first_group = share * blockIdx.x + min(blockIdx.x, rest);
  const int32_t inner_blocks = (p.inner + kInnerBlock - 1) / kInnerBlock;
  const int32_t chunks = (inner_blocks + kUnitBlocks - 1) / kUnitBlocks;  // units of a group
  const int32_t chunks_inverse = 65536 / chunks + 1;                      // exact for as few units as a batch has
  const int32_t batch_groups = kBatchUnits / chunks;

  auto cut = [&](Batch& batch) {
    batch.groups = min(min(batch_groups, own_groups - batch.first), static_cast<int32_t>(groups_of_pass) - batch.group);
  };
  auto advance = [&](Batch& batch) {  // whether to another pass
    batch.first += batch.groups;
    batch.group += batch.groups;
    const bool next_pass = batch.group == static_cast<int32_t>(groups_of_pass);
    if (next_pass) {
      batch.group = 0;
      ++batch.pass;
    }
    cut(batch);
    return next_pass;
  };
  // Rounds in which every warp takes a unit or none; an even number, so that each batch begins with the same fragment.
  auto rounds_of = [&](const Batch& batch) { return (batch.groups * chunks + 2 * Warps - 1) / (2 * Warps) * 2; };
  Batch batch = {0, 0, static_cast<int32_t>(first_group % groups_of_pass),
                 static_cast<int32_t>(first_group / groups_of_pass)};
  cut(batch);

  // Weights are asked for two units ahead.
  Batch load_batch = batch;
  int32_t load_round = 0, load_rounds = rounds_of(batch);
  const uint4* words;
  using FactorWords = std::remove_reference_t<decltype(Fragment<Factors>().factors[0])>;
  const FactorWords* factors;
  auto take_expert = [&] {
    const int32_t e = __shfl_sync(kFullWarp, expert, tile_of(load_batch.pass));
    const int64_t row = int64_t{e} * inner_blocks * p.weight_rows + lane / 4;
    words = p.weight + row * 4 + lane % 4;
    factors = reinterpret_cast<const FactorWords*>(p.factors) + row;
  };
  take_expert();
  auto load = [&](Fragment<Factors>(&to)[kUnitBlocks]) {
    if (load_batch.first == own_groups) return;
    const int32_t unit = load_round * Warps + warp;
    const int32_t group = unit * chunks_inverse >> 16;
    if (group < load_batch.groups) {
      const int32_t first_block = (unit - group * chunks) * kUnitBlocks;
      int32_t at = first_block * p.weight_rows + (load_batch.group + group) * kGroupRows;
#pragma unroll
      for (int i = 0; i < kUnitBlocks; ++i, at += p.weight_rows) {
        if (i > 0 && first_block + i == inner_blocks) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          to[i].words[j] = load_once(words + (int64_t{at} + 8 * j) * 4);
          to[i].factors[j] = load_once(factors + at + 8 * j);
        }
      }
    }
    if (++load_round == load_rounds) {
      load_round = 0;
      const bool next_pass = advance(load_batch);
      load_rounds = rounds_of(load_batch);
      if (next_pass && load_batch.first < own_groups) take_expert();
    }
  };
  const int32_t x_row = (inner_blocks * kInnerBlock + kRowPadding) / 8;  // in uint4
  float* const unit_sums = reinterpret_cast<float*>(shared + kPassRows * x_row);
  const int32_t row_vectors = p.inner / 8;
  const int32_t kept_vectors = inner_blocks * (kInnerBlock / 8);  // zeros behind the row's own
  const uint4* row_from = nullptr;                                // of the pass's last row, which keep_row() stores
  int32_t row_place = 0;
  uint4 row_part[kRowParts];
  auto ask_for_row = [&] {
#pragma unroll
    for (int i = 0; i < kRowParts; ++i) {
      const int32_t j = threadIdx.x + i * kThreads;
      row_part[i] = row_from && j < row_vectors ? row_from[j] : make_uint4(0, 0, 0, 0);
    }
  };
  auto keep_row = [&] {
#pragma unroll
    for (int i = 0; i < kRowParts; ++i) {
      const int32_t j = threadIdx.x + i * kThreads;
      if (j >= kept_vectors) break;
      // Pair j % 4 of a word of each of four lanes. A lane's four words of a block are those of group and half.
      uint32_t* const to = reinterpret_cast<uint32_t*>(shared + row_place * x_row) + j / 16 * 64 +
                           (j / 4 % 2 * 2 + j / 8 % 2) * 16 + j % 4;
      to[0] = row_part[i].x;
      to[4] = row_part[i].y;
      to[8] = row_part[i].z;
      to[12] = row_part[i].w;
    }
  };
  // Asks for a pass's rows of x and for what its sums are multiplied by. All rows but the last one are kept already.
  const uint4* lane_x = shared;
  auto ask_for_rows = [&](int32_t pass) {
    const int32_t tile = tile_of(pass);
    const int32_t before = __shfl_sync(kFullWarp, passes_up_to - passes, tile);
    const int32_t row = tile * kTileRows + (pass - before) * kPassRows;
    // Lane i of each warp finds row i.
    int32_t slot = -1, source = 0;
    if (lane < kPassRows) {
      slot = p.row_to_slot[row + lane];
      source = p.top_k > 0 ? slot / p.top_k : row + lane;
      if (slot < 0 || source >= p.x_rows) slot = -1;
    }
    const unsigned valid = __ballot_sync(kFullWarp, slot >= 0);
    const int32_t tile_expert = __shfl_sync(kFullWarp, expert, tile);
    if (threadIdx.x < kPassRows) {
      FewTilesRow found = {-1, 1.0f, kLeftOver, kLeftOver};
      if (slot >= 0) {
        found.number = row + lane;
        if (p.slot_weights) found.weight = p.slot_weights[slot];
        if (p.alphas > 0) {
          const float* const alpha = p.alpha + int64_t{tile_expert} * p.alphas;
          found.factor *= alpha[0];
          found.up_factor *= alpha[p.alphas - 1];
        }
      }
      rows[lane] = found;
    }
    row_place = valid ? 31 - __clz(valid) : 0;
    for (int i = 0; i < kPassRows; ++i) {
      const int32_t row_source = __shfl_sync(kFullWarp, source, i);
      if (!(valid >> i & 1) && valid) continue;  // without any row zeros are multiplied
      row_from = valid ? reinterpret_cast<const uint4*>(p.x + row_source * p.x_stride) : nullptr;
      ask_for_row();
      if (i >= row_place) break;
      const int32_t last = row_place;
      row_place = i;
      keep_row();
      row_place = last;
    }
    // A column of the product that stands for no row multiplies the last one, and is not stored.
    const int32_t column = lane / 4 % kPassRows;
    lane_x = shared + (valid >> column & 1 ? column : row_place) * x_row + lane % 4;
  };

  // Rows first: behind the first weights they would wait until memory has delivered all of those.
  ask_for_rows(batch.pass);
  Fragment<Factors> even[kUnitBlocks], odd[kUnitBlocks];
  load(even);
  load(odd);
  keep_row();
  __syncthreads();

  for (int32_t parity = 0;; parity ^= 1) {
    float* const sums_of_batch = unit_sums + parity * kBatchUnits * kUnitSums;
    auto multiply = [&](Fragment<Factors>(&unit_weights)[kUnitBlocks], int32_t round) {
      const int32_t unit = round * Warps + warp;
      const int32_t group = unit * chunks_inverse >> 16;
      if (group < batch.groups) {
        const int32_t first_block = (unit - group * chunks) * kUnitBlocks;
        const uint4* const unit_x = lane_x + first_block * (kInnerBlock / 8);
        float sums[2][4] = {};
        multiply_block<Factors>(sums, unit_weights[0], unit_x);
        if (first_block + 1 < inner_blocks) multiply_block<Factors>(sums, unit_weights[1], unit_x + kInnerBlock / 8);
        if (lane % 4 < kPassRows / 2) {
          float2* const to = reinterpret_cast<float2*>(sums_of_batch + unit * kUnitSums) + lane / 4 * 2 + lane % 4;
          to[0] = {sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]};
          to[8 * kPassRows / 2] = {sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]};
        }
      }
      load(unit_weights);
    };
    const int32_t rounds = rounds_of(batch);
    for (int32_t round = 0; round < rounds; round += 2) {
      multiply(even, round);
      multiply(odd, round + 1);
    }
    __syncthreads();

    // Other warps go on with the next batch's units, whose sums have memory of their own.
    constexpr int kOutputs = SwiGlu ? kUnitSums / 2 : kUnitSums;
    constexpr int kColumns = SwiGlu ? kGroupRows / 2 : kGroupRows;
    for (int32_t i = threadIdx.x; i < batch.groups * kOutputs; i += kThreads) {
      const FewTilesRow row = rows[i % kPassRows];
      if (row.number < 0) continue;
      const float* from = sums_of_batch + i / kOutputs * chunks * kUnitSums + i % kOutputs;
      float value = 0.0f, up = 0.0f;
#pragma unroll 4
      for (int32_t chunk = 0; chunk < chunks; ++chunk, from += kUnitSums) {
        value += from[0];
        if constexpr (SwiGlu) up += from[kOutputs];
      }
      value *= row.factor;
      if constexpr (SwiGlu) {
        up *= row.up_factor;
        // Comparisons and not fminf(): NaN stays NaN.
        value = value > p.limit ? p.limit : value;
        up = up > p.limit ? p.limit : up;
        up = up < -p.limit ? -p.limit : up;
        value = fast_silu(value) * up;
      }
      const int32_t column = (batch.group + i / kOutputs) * kColumns + i % kOutputs / kPassRows;
      p.out[row.number * p.out_stride + column] = __float2bfloat16_rn(value * row.weight);
    }
    const bool next_pass = advance(batch);
    if (batch.first == own_groups) return;
    if (next_pass) {
      __syncthreads();  // this pass's rows have been read
      ask_for_rows(batch.pass);
      keep_row();
      __syncthreads();
    }
  }
}

}  // namespace dsv4
