// The grouped product of few tiles: what its kernel is given, and what it can take. When it is used, the policy says.
#pragma once

#include <cuda_bf16.h>

#include "core/device.h"

namespace dsv4 {

constexpr int32_t kTileRows = 16;
constexpr int32_t kInnerBlock = 128;  // inner positions that lie together in the weights

constexpr int64_t kFewTiles = 12;               // at most
constexpr int64_t kFewTilesInner = 8192;        // at most: rows of this size fit in any device's shared memory
constexpr int64_t kFewTilesWeightRows = 65536;  // at most: so that an expert's words are counted in 32 bits
constexpr int kFewTilesBlocks = 2;              // of a multiprocessor: what the kernel is compiled for

struct FewTiles {
  const __nv_bfloat16* x;
  const uint4* weight;      // [experts, blocks of inner, weight_rows, 4]
  const uint32_t* factors;  // [experts, blocks of inner, weight_rows, 2 or 4]
  const int32_t* tile_to_expert;
  const int32_t* row_to_slot;
  const float* alpha;         // or null
  const float* slot_weights;  // or null
  __nv_bfloat16* out;
  int64_t x_stride;
  int64_t out_stride;
  int32_t weight_rows;
  int32_t inner;  // of x; weights have whole blocks
  int32_t experts;
  int32_t x_rows;
  int32_t top_k;
  int32_t alphas;
  int32_t tiles;
  float limit;
};

// Launches the kernel of csrc/moe/moe_grouped_gemm.cu. nvfp4: four words of factors a weight row, else two.
dsv4_status launch_few_tiles(const LaunchTarget& target, const FewTiles& product, bool nvfp4, bool swiglu);

}  // namespace dsv4
