// The grouped product of few tiles of 16 rows with interleaved FP4 weights (python/dsv4_kernels/moe/
// interleaved_weights.py): a decode step of a few tokens, bound by the bandwidth at which weights are read.
//
// How the work is divided, from large to small:
//   tile   16 rows of x of one expert, as moe_sort lays them out; the last ones may be padding
//   pass   up to kPassRows rows of a tile times all weight rows of its expert
//   group  16 weight rows of a pass. The groups of all passes are one list; every block takes an equal share of it
//   batch  consecutive groups of one pass whose sums fit in shared memory
//   unit   256 inner positions of a group: what a warp multiplies at a time. Warps take a batch's units in turn
// A unit's sums go to shared memory, and the sums of a group are added in the order of the inner positions. So a result
// does not depend on which warp or block computed which part of it.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "core/launch.h"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "device/swiglu.cuh"
#include "moe/few_tiles.h"

namespace dsv4 {

static_assert(kFewTiles <= kWarpLanes, "a lane knows a tile");
constexpr int kGroupRows = 16;   // with SwiGLU 8 of the gate and the same 8 of up
constexpr int kUnitBlocks = 2;   // blocks of kInnerBlock inner positions per unit
constexpr int kPassRows = 4;     // columns of the product that hold rows of x
constexpr int kBatchUnits = 64;  // at most; shared memory holds the sums of two batches
constexpr int kUnitSums = kGroupRows * kPassRows;
constexpr float kRemainingBias = 256.0f;  // the weights' factors are this much too small
constexpr int kRowPadding = 32;           // elements after each row in shared memory, to avoid bank conflicts

// Dequantises the 8 codes of a word to four pairs of bfloat16: aot/moe/device/interleaved_weights.py explains the bits.
__device__ __forceinline__ void dequantize(uint32_t word, uint32_t first, uint32_t second, uint32_t (&pairs)[4]) {
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

// A lane's weights for one block of inner positions: 4 words of each of rows lane / 4 and lane / 4 + 8, and the factors
// of these rows.
template <int Factors>
struct Fragment {
  uint4 words[2];
  std::conditional_t<Factors == 2, uint2, uint4> factors[2];
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ uint32_t word_of(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

// Adds the products of one block of inner positions, in two independent accumulators so that consecutive mma do not
// depend on each other. x: this lane's operands in shared memory.
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
      dequantize(word_of(w.words[row], word), __byte_perm(first, 0, which), __byte_perm(second, 0, which), pairs[row]);
    }
    const uint4 b = x[word * 4];
    multiply_add(sums[0], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
    multiply_add(sums[1], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z, b.w);
  }
}

// A row of the pass, as the epilogue needs it.
struct PassRow {
  int32_t number;  // in the output, or -1: padding
  float weight;
  float factor, up_factor;  // of the sums: of the gate's (or all) and of up's
};

// Bytes of dynamic shared memory: rows of x, and the sums of two batches. The same for every product: changing the
// split between shared memory and L1 cache requires an idle multiprocessor.
constexpr uint32_t kFewTilesShared = kPassRows * (kFewTilesInner + kRowPadding) * 2 + 2 * kBatchUnits * kUnitSums * 4;

// Every warp holds the table of all tiles, lane t that of tile t. All members are called by whole warps.
struct TileTable {
  int32_t expert = -1;   // of this lane's tile
  int32_t passes = 0;    // that this lane's tile needs: 0 without rows or with an expert out of range
  int32_t passes_up_to;  // of tiles 0 to this lane's

  __device__ __forceinline__ TileTable(const FewTiles& p, int lane) {
    if (lane < p.tiles) {
      expert = p.tile_to_expert[lane];
#pragma unroll
      for (int i = 0; i < kTileRows; ++i)
        if (p.row_to_slot[lane * kTileRows + i] >= 0) passes = i / kPassRows + 1;
      if (expert < 0 || expert >= p.experts) passes = 0;
    }
    passes_up_to = passes;
#pragma unroll
    for (int distance = 1; distance < kWarpLanes; distance *= 2) {
      const int32_t below = __shfl_up_sync(kFullWarp, passes_up_to, distance);
      if (lane >= distance) passes_up_to += below;
    }
  }

  __device__ __forceinline__ uint32_t all_passes() const {
    return __shfl_sync(kFullWarp, passes_up_to, kWarpLanes - 1);
  }
  __device__ __forceinline__ int32_t tile_of(int32_t pass) const {
    return __popc(__ballot_sync(kFullWarp, passes_up_to <= pass));
  }
  __device__ __forceinline__ int32_t passes_before(int32_t tile) const {
    return __shfl_sync(kFullWarp, passes_up_to - passes, tile);
  }
  __device__ __forceinline__ int32_t expert_of(int32_t tile) const { return __shfl_sync(kFullWarp, expert, tile); }
};

struct Batch {
  int32_t first;   // group, counted from the start of the block's share
  int32_t groups;  // in the batch
  int32_t group;   // the first one, counted from the start of its pass
  int32_t pass;
};

// The groups that a block computes, and how they are divided into batches and units.
template <int Warps>
struct BlockShare {
  uint32_t pass_groups;  // groups per pass
  int32_t groups;        // of this block; 0: nothing to do, and the members below are not set
  uint32_t first_group;  // in the list of all passes' groups
  int32_t inner_blocks;
  int32_t group_units;          // units per group
  int32_t group_units_inverse;  // 2^16 / group_units, rounded up: exact for the units of a batch
  int32_t batch_groups;         // at most

  __device__ __forceinline__ BlockShare(const FewTiles& p, const TileTable& tiles) {
    pass_groups = p.weight_rows / kGroupRows;
    const uint32_t all_groups = tiles.all_passes() * pass_groups;
    const uint32_t share = all_groups / gridDim.x, rest = all_groups % gridDim.x;
    groups = share + (blockIdx.x < rest);
    if (groups == 0) return;
    first_group = share * blockIdx.x + min(blockIdx.x, rest);
    inner_blocks = (p.inner + kInnerBlock - 1) / kInnerBlock;
    group_units = (inner_blocks + kUnitBlocks - 1) / kUnitBlocks;
    group_units_inverse = 65536 / group_units + 1;
    batch_groups = kBatchUnits / group_units;
  }

  __device__ __forceinline__ Batch first_batch() const {
    Batch batch = {0, 0, static_cast<int32_t>(first_group % pass_groups),
                   static_cast<int32_t>(first_group / pass_groups)};
    limit(batch);
    return batch;
  }

  // Makes `batch` the next one. Returns whether that belongs to another pass.
  __device__ __forceinline__ bool advance(Batch& batch) const {
    batch.first += batch.groups;
    batch.group += batch.groups;
    const bool next_pass = batch.group == static_cast<int32_t>(pass_groups);
    if (next_pass) {
      batch.group = 0;
      ++batch.pass;
    }
    limit(batch);
    return next_pass;
  }
  __device__ __forceinline__ bool is_past_the_last(const Batch& batch) const { return batch.first == groups; }

  // Rounds of a batch, in each of which every warp takes one unit or none: an even number, because weights are
  // prefetched to two buffers in turn.
  __device__ __forceinline__ int32_t rounds_of(const Batch& batch) const {
    return (batch.groups * group_units + 2 * Warps - 1) / (2 * Warps) * 2;
  }
  // The unit's group, counted from the batch's first.
  __device__ __forceinline__ int32_t group_of(int32_t unit) const { return unit * group_units_inverse >> 16; }
  __device__ __forceinline__ int32_t first_inner_block(int32_t unit, int32_t group) const {
    return (unit - group * group_units) * kUnitBlocks;
  }

 private:
  __device__ __forceinline__ void limit(Batch& batch) const {
    batch.groups = min(min(batch_groups, groups - batch.first), static_cast<int32_t>(pass_groups) - batch.group);
  }
};

// Prefetches a warp's units of weights, in the order in which they are multiplied, across batches and passes.
template <int Factors, int Warps>
class WeightPipeline {
 public:
  using Unit = Fragment<Factors>[kUnitBlocks];

  __device__ __forceinline__ WeightPipeline(const FewTiles& p, const TileTable& tiles, const BlockShare<Warps>& share,
                                            const Batch& first, int lane)
      : p_(p), tiles_(tiles), share_(share), batch_(first), rounds_(share.rounds_of(first)) {
    find_expert(lane);
  }

  // Loads this warp's next unit, if it has one in the current round.
  __device__ __forceinline__ void load(Unit& to, int lane, int warp) {
    if (share_.is_past_the_last(batch_)) return;
    const int32_t unit = round_ * Warps + warp;
    const int32_t group = share_.group_of(unit);
    if (group < batch_.groups) {
      const int32_t first_block = share_.first_inner_block(unit, group);
      int32_t at = first_block * p_.weight_rows + (batch_.group + group) * kGroupRows;
#pragma unroll
      for (int i = 0; i < kUnitBlocks; ++i, at += p_.weight_rows) {
        if (i > 0 && first_block + i == share_.inner_blocks) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          to[i].words[j] = load_once(words_ + (int64_t{at} + 8 * j) * 4);
          to[i].factors[j] = load_once(factors_ + at + 8 * j);
        }
      }
    }
    if (++round_ == rounds_) {
      round_ = 0;
      const bool next_pass = share_.advance(batch_);
      rounds_ = share_.rounds_of(batch_);
      if (next_pass && !share_.is_past_the_last(batch_)) find_expert(lane);
    }
  }

 private:
  using FactorWords = std::remove_reference_t<decltype(Fragment<Factors>().factors[0])>;

  // Points words_ and factors_ to this lane's part of the batch's expert.
  __device__ __forceinline__ void find_expert(int lane) {
    const int32_t expert = tiles_.expert_of(tiles_.tile_of(batch_.pass));
    const int64_t row = int64_t{expert} * share_.inner_blocks * p_.weight_rows + lane / 4;
    words_ = p_.weight + row * 4 + lane % 4;
    factors_ = reinterpret_cast<const FactorWords*>(p_.factors) + row;
  }

  const FewTiles& p_;
  const TileTable& tiles_;
  const BlockShare<Warps>& share_;
  Batch batch_;  // of the next unit
  int32_t round_ = 0, rounds_;
  const uint4* words_;
  const FactorWords* factors_;
};

// The rows of x of one pass: in shared memory, in the order in which lanes multiply them.
template <int Threads>
class RowTile {
 public:
  __device__ __forceinline__ RowTile(const FewTiles& p, int32_t inner_blocks, uint4* shared)
      : p_(p),
        shared_(shared),
        stride_((inner_blocks * kInnerBlock + kRowPadding) / 8),
        vectors_(p.inner / 8),
        stored_vectors_(inner_blocks * (kInnerBlock / 8)) {}

  __device__ __forceinline__ uint4* end() const { return shared_ + kPassRows * stride_; }
  // Where this lane's operands start.
  __device__ __forceinline__ const uint4* of_lane() const { return of_lane_; }

  // Prefetches the pass's rows and fills `rows`. All rows but the last are stored to shared memory here;
  // store_last_row() stores that one.
  __device__ __forceinline__ void load(const TileTable& tiles, int32_t pass, PassRow* rows, int lane) {
    const int32_t tile = tiles.tile_of(pass);
    const int32_t before = tiles.passes_before(tile);
    const int32_t row = tile * kTileRows + (pass - before) * kPassRows;
    // Lane i of each warp finds row i.
    int32_t slot = -1, source = 0;
    if (lane < kPassRows) {
      slot = p_.row_to_slot[row + lane];
      source = p_.top_k > 0 ? slot / p_.top_k : row + lane;
      if (slot < 0 || source >= p_.x_rows) slot = -1;
    }
    const unsigned valid = __ballot_sync(kFullWarp, slot >= 0);
    const int32_t expert = tiles.expert_of(tile);
    if (threadIdx.x < kPassRows) rows[lane] = describe(slot, row + lane, expert);
    place_ = valid ? 31 - __clz(valid) : 0;
    for (int i = 0; i < kPassRows; ++i) {
      const int32_t row_source = __shfl_sync(kFullWarp, source, i);
      if (!(valid >> i & 1) && valid) continue;  // a pass without any row multiplies zeros
      from_ = valid ? reinterpret_cast<const uint4*>(p_.x + row_source * p_.x_stride) : nullptr;
      load_row();
      if (i >= place_) break;
      const int32_t last = place_;
      place_ = i;
      store_last_row();
      place_ = last;
    }
    // A column of the product without a row multiplies the last row; its sums are not stored.
    const int32_t column = lane / 4 % kPassRows;
    of_lane_ = shared_ + (valid >> column & 1 ? column : place_) * stride_ + lane % 4;
  }

  __device__ __forceinline__ void store_last_row() {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int32_t j = threadIdx.x + i * Threads;
      if (j >= stored_vectors_) break;
      // Pair j % 4 of a word of each of four lanes. A lane's four words of a block are those of group and half.
      uint32_t* const to = reinterpret_cast<uint32_t*>(shared_ + place_ * stride_) + j / 16 * 64 +
                           (j / 4 % 2 * 2 + j / 8 % 2) * 16 + j % 4;
      to[0] = part_[i].x;
      to[4] = part_[i].y;
      to[8] = part_[i].z;
      to[12] = part_[i].w;
    }
  }

 private:
  static constexpr int kParts = (kFewTilesInner / 8 + Threads - 1) / Threads;  // vectors per thread of the longest row

  __device__ __forceinline__ PassRow describe(int32_t slot, int32_t number, int32_t expert) const {
    PassRow row = {-1, 1.0f, kRemainingBias, kRemainingBias};
    if (slot >= 0) {
      row.number = number;
      if (p_.slot_weights) row.weight = p_.slot_weights[slot];
      if (p_.alphas > 0) {
        const float* const alpha = p_.alpha + int64_t{expert} * p_.alphas;
        row.factor *= alpha[0];
        row.up_factor *= alpha[p_.alphas - 1];
      }
    }
    return row;
  }

  __device__ __forceinline__ void load_row() {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int32_t j = threadIdx.x + i * Threads;
      part_[i] = from_ && j < vectors_ ? from_[j] : make_uint4(0, 0, 0, 0);
    }
  }

  const FewTiles& p_;
  uint4* const shared_;
  const int32_t stride_;          // from row to row, in vectors of 8 elements, as the next two
  const int32_t vectors_;         // of a row of x
  const int32_t stored_vectors_;  // whole blocks: zeros follow the row's own
  const uint4* from_ = nullptr;   // the row in part_
  int32_t place_ = 0;             // where store_last_row() puts it
  uint4 part_[kParts];
  const uint4* of_lane_ = nullptr;
};

// Multiplies a warp's unit of weights, if it has one in this round, and leaves its sums in shared memory.
template <int Factors, int Warps>
__device__ __forceinline__ void multiply_unit(const Fragment<Factors> (&weights)[kUnitBlocks], const uint4* x,
                                              const BlockShare<Warps>& share, const Batch& batch, int32_t unit,
                                              float* batch_sums, int lane) {
  const int32_t group = share.group_of(unit);
  if (group >= batch.groups) return;
  const int32_t first_block = share.first_inner_block(unit, group);
  const uint4* const unit_x = x + first_block * (kInnerBlock / 8);
  float sums[2][4] = {};
  multiply_block<Factors>(sums, weights[0], unit_x);
  if (first_block + 1 < share.inner_blocks) multiply_block<Factors>(sums, weights[1], unit_x + kInnerBlock / 8);
  if (lane % 4 < kPassRows / 2) {
    float2* const to = reinterpret_cast<float2*>(batch_sums + unit * kUnitSums) + lane / 4 * 2 + lane % 4;
    to[0] = {sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]};
    to[8 * kPassRows / 2] = {sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]};
  }
}

// Epilogue of a batch: adds the sums of each group's units, scales, applies SwiGLU and stores.
template <bool SwiGlu, int Threads>
__device__ __forceinline__ void reduce_and_store(const FewTiles& p, const Batch& batch, int32_t group_units,
                                                 const float* batch_sums, const PassRow* rows) {
  constexpr int kOutputs = SwiGlu ? kUnitSums / 2 : kUnitSums;
  constexpr int kColumns = SwiGlu ? kGroupRows / 2 : kGroupRows;
  for (int32_t i = threadIdx.x; i < batch.groups * kOutputs; i += Threads) {
    const PassRow row = rows[i % kPassRows];
    if (row.number < 0) continue;
    const float* from = batch_sums + i / kOutputs * group_units * kUnitSums + i % kOutputs;
    float value = 0.0f, up = 0.0f;
#pragma unroll 4
    for (int32_t unit = 0; unit < group_units; ++unit, from += kUnitSums) {
      value += from[0];
      if constexpr (SwiGlu) up += from[kOutputs];
    }
    value *= row.factor;
    if constexpr (SwiGlu) value = swiglu(value, up * row.up_factor, p.limit);
    const int32_t column = (batch.group + i / kOutputs) * kColumns + i % kOutputs / kPassRows;
    p.out[row.number * p.out_stride + column] = __float2bfloat16_rn(value * row.weight);
  }
}

template <int Factors, bool SwiGlu, int Warps, int Blocks>
__global__ void __launch_bounds__(Warps* kWarpLanes, Blocks) moe_few_tiles_kernel(FewTiles p) {
  await_previous_grid();
  constexpr int kThreads = Warps * kWarpLanes;
  extern __shared__ uint4 shared[];
  __shared__ PassRow rows[kPassRows];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;

  const TileTable tiles(p, lane);
  const BlockShare<Warps> share(p, tiles);
  if (share.groups == 0) return;
  Batch batch = share.first_batch();
  WeightPipeline<Factors, Warps> weights(p, tiles, share, batch, lane);
  RowTile<kThreads> x(p, share.inner_blocks, shared);
  float* const sums = reinterpret_cast<float*>(x.end());

  // Rows first: behind the first weights they would wait until memory has delivered all of those.
  x.load(tiles, batch.pass, rows, lane);
  Fragment<Factors> even[kUnitBlocks], odd[kUnitBlocks];
  weights.load(even, lane, warp);
  weights.load(odd, lane, warp);
  x.store_last_row();
  __syncthreads();

  for (int32_t parity = 0;; parity ^= 1) {
    float* const batch_sums = sums + parity * kBatchUnits * kUnitSums;
    const int32_t rounds = share.rounds_of(batch);
    for (int32_t round = 0; round < rounds; round += 2) {
      multiply_unit(even, x.of_lane(), share, batch, round * Warps + warp, batch_sums, lane);
      weights.load(even, lane, warp);
      multiply_unit(odd, x.of_lane(), share, batch, (round + 1) * Warps + warp, batch_sums, lane);
      weights.load(odd, lane, warp);
    }
    __syncthreads();
    // Other warps may already multiply the next batch, whose sums lie elsewhere.
    reduce_and_store<SwiGlu, kThreads>(p, batch, share.group_units, batch_sums, rows);
    const bool next_pass = share.advance(batch);
    if (share.is_past_the_last(batch)) return;
    if (next_pass) {
      __syncthreads();  // this pass's rows have been read
      x.load(tiles, batch.pass, rows, lane);
      x.store_last_row();
      __syncthreads();
    }
  }
}

}  // namespace dsv4
