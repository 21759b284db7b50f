// Which kernel of moe_grouped_gemm takes a product. aot/moe declares the tile shapes of the aot kernels.
#pragma once

#include <algorithm>

#include "core/policy.h"
#include "moe/few_tiles.h"

namespace dsv4 {

// Average slots per expert up to which tiles of so many rows are the fastest. H100 (docs/decisions/0017). One number
// for all devices, as callers choose by it while they trace, without a device; not measured on sm_100a and sm_120a.
constexpr int64_t max_slots_per_expert(int64_t tile_rows) {
  return tile_rows == 16 ? 12 : tile_rows == 64 ? 56 : tile_rows == 128 ? INT64_MAX : 0;
}

struct FewTilesTuning {
  int64_t many_weight_rows;  // per tile, from which the aot kernel's second wave is nearly empty
};

inline constexpr PerGeneration<FewTilesTuning> kFewTilesTuning = {
    // H100 (docs/decisions/0018): 528 blocks of 64 weight rows run at once, and six tiles of v4-pro have 576 or 672.
    // Whole layer, us for 1 / 2 / 4 tokens: v4-pro 127.4 / 185 / 309 without this kernel, 109.1 / 176.9 / 328 with it;
    // v4-flash, where it is not chosen, 43.1 / 82.0 / 126.6 without and 44.9 / 76.2 / 131.7 with it.
    {6144},
    {6144},  // copied from sm_90a, not measured
    {6144},  // copied from sm_90a, not measured
};

struct GroupedGemmProblem {
  bool interleaved;
  int64_t tile_rows, tiles, experts, weight_rows, inner;
};

struct GroupedGemmPolicy {
  bool few_tiles;  // the kernel for few tiles, else the aot kernel of these operands and tile rows
};

// By shapes and the device alone, so that a captured launch fits any routes. block_rows: weight rows of a block of the
// aot kernel.
constexpr GroupedGemmPolicy moe_grouped_gemm_policy(const Device& device, const GroupedGemmProblem& problem,
                                                    int64_t block_rows) {
  const bool possible = problem.interleaved && problem.tile_rows == kTileRows &&
                        problem.tiles <= std::min(kFewTiles, problem.experts) && problem.inner <= kFewTilesInner &&
                        problem.weight_rows <= kFewTilesWeightRows;
  // With fewer blocks than multiprocessors the aot kernel leaves some idle.
  const bool idle = problem.tiles * problem.weight_rows <= device.multiprocessors * block_rows;
  return {possible && (idle || problem.weight_rows >= kFewTilesTuning.of(device).many_weight_rows)};
}

// Blocks of the kernel for few tiles: as many as run at once, and no more than there are groups of weight rows.
constexpr uint32_t few_tiles_blocks(const Device& device, int64_t groups, int64_t shared_bytes) {
  const int fit = static_cast<int>(device.shared_per_block / shared_bytes);
  const int resident = std::clamp(fit, 1, kFewTilesBlocks);
  return static_cast<uint32_t>(std::min<int64_t>(int64_t{device.multiprocessors} * resident, groups));
}

}  // namespace dsv4
