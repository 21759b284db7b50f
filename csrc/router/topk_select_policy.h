// Which kernel of topk_select takes a row, and how many blocks share it.
#pragma once

#include "core/launch.h"
#include "core/policy.h"

namespace dsv4 {

struct TopkSelectLimits {
  int64_t short_results;   // that a warp with the row in registers finds, of at most
  int64_t short_columns;   // so many columns
  int64_t threads;         // of a block for longer rows
  int64_t thread_columns;  // of a thread that keeps its part of the row in registers, at most
  uint32_t cluster;        // blocks that can share a row, at most
};

struct TopkSelectTuning {
  int64_t few_columns;  // a block with fewer would wait for the others of its row longer than it works
};

inline constexpr PerGeneration<TopkSelectTuning> kTopkSelectTuning = {
    // H100 (docs/decisions/0012): 64 x 32768, k 2048: 13.8 us with two blocks per row, 24 with four, which are not all
    // resident. 1 x 262144: 18.7 us with eight.
    {4096},
    {4096},  // copied from sm_90a, not measured
    {4096},  // copied from sm_90a, not measured
};

struct TopkSelectProblem {
  int64_t rows, columns, top_k;
};

enum class TopkSelectKernel { kShort, kLong, kStreamed };

struct TopkSelectPolicy {
  TopkSelectKernel kernel;
  uint32_t cluster;        // blocks of a row
  int64_t thread_columns;  // kLong: of a thread, in registers
};

constexpr TopkSelectPolicy topk_select_policy(const Device& device, const TopkSelectLimits& limits,
                                              const TopkSelectProblem& problem) {
  if (problem.top_k <= limits.short_results && problem.columns <= limits.short_columns)
    return {TopkSelectKernel::kShort, 1, 0};
  const int64_t block_columns = limits.threads * limits.thread_columns;
  if (problem.columns > limits.cluster * block_columns) return {TopkSelectKernel::kStreamed, limits.cluster, 0};
  // As many blocks as the columns take, and more while multiprocessors would be idle.
  const int64_t few_columns = kTopkSelectTuning.of(device).few_columns;
  uint32_t blocks = 1;
  while (blocks * block_columns < problem.columns) blocks *= 2;
  while (blocks < limits.cluster && problem.rows * blocks * 2 <= device.multiprocessors &&
         blocks * 2 * few_columns <= problem.columns)
    blocks *= 2;
  int64_t thread_columns = 8;
  while (limits.threads * thread_columns < blocks_for(problem.columns, blocks)) thread_columns *= 2;
  return {TopkSelectKernel::kLong, blocks, thread_columns};
}

}  // namespace dsv4
