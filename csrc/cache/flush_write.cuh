// Quantises an entry (and an indexer key) and writes it to the pool in the split layout: shared by flush_write_csa and
// flush_write_hca. One block per request for the entry, one for the indexer key. One warp computes the place, which
// takes three dependent loads, while the others quantise.
#pragma once

#include "cache/entry_codec.cuh"
#include "cache/tail.cuh"
#include "core/launch.h"
#include "device/divide.cuh"
#include "device/row.cuh"

namespace dsv4 {

constexpr int kEntryWarps = 4;
constexpr int kEntryThreads = (kEntryWarps + 1) * kWarpLanes;
constexpr int kFoursPerLane = 8;  // every warp loads the whole entry to find its amax
constexpr int64_t kMaxHeadDim = kWarpLanes * kFoursPerLane * kFour;
constexpr int kEight = 8;  // indexer columns per thread
constexpr dsv4_page_layout_info kSplit = kPageLayouts[DSV4_PAGE_SPLIT];
constexpr dsv4_page_layout_info kSplitIndexer = kPageLayouts[DSV4_PAGE_SPLIT_INDEXER];
constexpr int kNvfp4Group = kSplitIndexer.group;

// Where the entries of a batch go.
struct PoolTarget {
  const int32_t* request_slots;
  const int64_t* slot_positions;
  const int32_t* block_table;
  int64_t slots;
  int64_t table_stride;
  int64_t table_columns;
  int64_t blocks;
  LongDivisor entries_per_block;
  LongDivisor m;
};

struct SplitPages {
  uint8_t* entries_fp8;
  __nv_bfloat16* entries_rope;
  float* inv_scale;
  uint8_t* indexer_keys_fp4;
  uint8_t* indexer_scale;
  int head_dim;
  int rope_dim;
  int indexer_head_dim;
};

// The entry's row in the pool, or -1 if it has none.
__device__ inline int64_t pool_row(const PoolTarget& target, int64_t request) {
  const int64_t slot = slot_of(target.request_slots, request, target.slots);
  if (slot < 0) return -1;
  const int64_t position = target.slot_positions[slot];
  if (position < 1) return -1;
  const int64_t entry = target.m.quotient(position - 1);
  const int64_t column = target.entries_per_block.quotient(entry);
  if (column >= target.table_columns) return -1;
  const int64_t block = target.block_table[request * target.table_stride + column];
  if (block < 0 || block >= target.blocks) return -1;
  return entry + (block - column) * target.entries_per_block.value;
}

// Eight columns of the indexer key per thread; two threads share a scale. `row` is valid after the block's barrier.
__device__ inline void write_indexer_key(const SplitPages& pages, const __nv_bfloat16* key, const int64_t& row) {
  constexpr int kColumns = kEntryWarps * kWarpLanes * kEight;
  for (int first = 0; first < pages.indexer_head_dim; first += kColumns) {
    const int column = first + threadIdx.x * kEight;
    const bool inside = threadIdx.x * kEight < kColumns && column < pages.indexer_head_dim;
    float values[kEight] = {};
    float amax = 0.0f;
    if (inside) {
#pragma unroll
      for (int i = 0; i < kEight; i += kFour) {
        const Four<__nv_bfloat16> four = *reinterpret_cast<const Four<__nv_bfloat16>*>(key + column + i);
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
          values[i + j] = static_cast<float>(four.values[j]);
          amax = max_or_nan(amax, fabsf(values[i + j]));
        }
      }
    }
    amax = max_over_group(amax, kNvfp4Group / kEight);
    uint32_t scale_code = 0, codes = 0;
    if (inside) {  // dividing zeros takes the slow path of IEEE division
      scale_code = encode_e4m3(wanted_scale(amax, kLargestE2m1, kSplitIndexer.amax_floor));
      divide_by_scale(values, decode_e4m3(scale_code));
      codes = encode_e2m1x8(values);
    }
    if (first == 0) __syncthreads();
    if (!inside || row < 0) continue;
    *reinterpret_cast<uint32_t*>(pages.indexer_keys_fp4 + row * (pages.indexer_head_dim / 2) + column / 2) = codes;
    if (column % kNvfp4Group == 0)
      pages.indexer_scale[row * (pages.indexer_head_dim / kNvfp4Group) + column / kNvfp4Group] =
          static_cast<uint8_t>(scale_code);
  }
}

// Block (r, 0) writes request r's entry, block (r, 1) its indexer key.
template <bool WithIndexer>
__global__ void __launch_bounds__(kEntryThreads)
    flush_write_kernel(const __nv_bfloat16* __restrict__ entry, const __nv_bfloat16* __restrict__ indexer_key,
                       const bool* __restrict__ valid_mask, PoolTarget target, SplitPages pages) {
  await_previous_grid();
  __shared__ int64_t row;
  const int64_t request = blockIdx.x;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  if (warp == kEntryWarps && lane == 0) {
    const bool valid = valid_mask[request];
    const int64_t found = pool_row(target, request);
    row = valid ? found : -1;
  }
  if (WithIndexer && blockIdx.y == 1) {
    write_indexer_key(pages, indexer_key + request * pages.indexer_head_dim, row);
    return;
  }
  const int stored = pages.head_dim - pages.rope_dim;
  Four<__nv_bfloat16> fours[kFoursPerLane] = {};
  uint32_t codes[kFoursPerLane] = {};
  float scale = 0.0f;
  const auto column_of = [lane](int i) { return (i * kWarpLanes + lane) * kFour; };
  if (warp < kEntryWarps) {
    const __nv_bfloat16* const values = entry + request * pages.head_dim;
#pragma unroll
    for (int i = 0; i < kFoursPerLane; ++i) fours[i] = load_four(values, column_of(i), pages.head_dim, true);
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kFoursPerLane; ++i) {
      if (column_of(i) >= stored) continue;
#pragma unroll
      for (int j = 0; j < kFour; ++j) amax = max_or_nan(amax, fabsf(static_cast<float>(fours[i].values[j])));
    }
    scale = wanted_scale(max_over_group(amax, kWarpLanes), kLargestE4m3, kSplit.amax_floor);
#pragma unroll
    for (int i = 0; i < kFoursPerLane; ++i) {
      if (i % kEntryWarps != warp || column_of(i) >= stored) continue;
      float scaled[kFour];
#pragma unroll
      for (int j = 0; j < kFour; ++j) scaled[j] = static_cast<float>(fours[i].values[j]);
      divide_by_scale(scaled, scale);
      codes[i] = encode_e4m3x4(scaled[0], scaled[1], scaled[2], scaled[3]);
    }
  }
  __syncthreads();
  if (row < 0 || warp == kEntryWarps) return;
  if (threadIdx.x == 0) pages.inv_scale[row] = scale;
#pragma unroll
  for (int i = 0; i < kFoursPerLane; ++i) {
    const int column = column_of(i);
    if (i % kEntryWarps != warp || column >= pages.head_dim) continue;
    if (column < stored)
      *reinterpret_cast<uint32_t*>(pages.entries_fp8 + row * stored + column) = codes[i];
    else
      *reinterpret_cast<Four<__nv_bfloat16>*>(pages.entries_rope + row * pages.rope_dim + column - stored) = fours[i];
  }
}

// The arguments that both ops have. Args is the struct of one of them.
template <typename Args>
void check_flush_write(Check& check, const Args& args) {
  const int64_t requests = extent(args.entry, 0);
  const int64_t head_dim = extent(args.entry, 1);
  const int64_t blocks = extent(args.entries_fp8, 0);
  const int64_t per_block = extent(args.entries_fp8, 1);
  const int64_t rope_dim = extent(args.entries_rope, 2);
  check.tensor("entry", args.entry, one_of(DSV4_BFLOAT16), {kAny, kAny});
  check.range("entry columns (head_dim)", head_dim, 0, kMaxHeadDim);
  check.multiple("entry columns (head_dim)", head_dim, kFour);
  check.aligned_rows("entry", args.entry, kFour * sizeof(__nv_bfloat16));
  check.tensor("valid_mask", args.valid_mask, one_of(DSV4_BOOL), {requests});
  check.tensor("request_slots", args.request_slots, one_of(DSV4_INT32), {requests});
  check.tensor("slot_positions", args.slot_positions, one_of(DSV4_INT64), {kAny});
  check.tensor("block_table", args.block_table, one_of(DSV4_INT32), {requests, kAny}, Layout::kStridedRows);
  check.tensor("entries_rope", args.entries_rope, one_of(DSV4_BFLOAT16), {kAny, kAny, kAny});
  check.range("entries_rope columns (rope_dim)", rope_dim, 0, head_dim);
  check.multiple("entries_rope columns (rope_dim)", rope_dim, kFour);
  check.aligned_rows("entries_rope", args.entries_rope, kFour * sizeof(__nv_bfloat16));
  if (check.status()) return;  // the code below computes with these extents
  check.tensor("entries_fp8", args.entries_fp8, one_of(DSV4_FLOAT8_E4M3FN, DSV4_UINT8),
               {extent(args.entries_rope, 0), extent(args.entries_rope, 1), head_dim - rope_dim});
  check.aligned_rows("entries_fp8", args.entries_fp8, kFour);
  check.tensor("inv_scale", args.inv_scale, one_of(DSV4_FLOAT32), {blocks, per_block});
  check.range("m", args.m, 1, INT32_MAX);
  check.changes(args.entries_fp8, args.entries_rope, args.inv_scale);
}

template <typename Args>
PoolTarget pool_target(const Args& args) {
  PoolTarget target = {};
  target.request_slots = static_cast<const int32_t*>(args.request_slots.data);
  target.slot_positions = static_cast<const int64_t*>(args.slot_positions.data);
  target.block_table = static_cast<const int32_t*>(args.block_table.data);
  target.slots = extent(args.slot_positions, 0);
  target.table_stride = args.block_table.stride[0];
  target.table_columns = extent(args.block_table, 1);
  target.blocks = extent(args.entries_fp8, 0);
  target.entries_per_block = LongDivisor(extent(args.entries_fp8, 1));
  target.m = LongDivisor(args.m);
  return target;
}

template <typename Args>
SplitPages split_pages(const Args& args) {
  SplitPages pages = {};
  pages.entries_fp8 = static_cast<uint8_t*>(args.entries_fp8.data);
  pages.entries_rope = static_cast<__nv_bfloat16*>(args.entries_rope.data);
  pages.inv_scale = static_cast<float*>(args.inv_scale.data);
  pages.head_dim = static_cast<int>(extent(args.entry, 1));
  pages.rope_dim = static_cast<int>(extent(args.entries_rope, 2));
  return pages;
}

}  // namespace dsv4
