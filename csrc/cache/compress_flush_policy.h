// How compress_flush shares out tokens and entries.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "core/policy.h"

namespace dsv4 {

constexpr int kShortWindow = 8;  // rows of a window, up to which a thread pools a channel's alone

struct CompressFlushTuning {
  int64_t short_blocks;   // short windows: blocks of the grid per multiprocessor, enough to choose from
  int64_t short_threads;  // short windows: up to so many threads per multiprocessor, a second group of them pools too
  int long_blocks;        // long windows: blocks that a multiprocessor holds; the kernel is compiled for it
};

inline constexpr PerGeneration<CompressFlushTuning> kCompressFlushTuning = {
    // H100 (docs/decisions/0014). CSA: 3.7 / 4.0 / 5.4 us for 1 / 64 / 256 requests. HCA: 17.2 us with three blocks of
    // two rows in flight, 20.3 with two blocks of four rows.
    {16, 128, 3},
    // Copied from sm_90a, not measured; but for long_blocks: the kernel takes 112 to 126 registers there, of which two
    // blocks of 256 threads fit, and would spill with the 80 that three leave.
    {16, 128, 2},
    {16, 128, 2},
};

struct CompressFlushProblem {
  int64_t tokens;
  int64_t tokens_per_request;
  int window;  // rows that an entry pools
  int ratio;   // tokens of an entry
  int head_dim;
  int64_t threads;  // of an entry's channels
};

struct CompressFlushPolicy {
  int32_t tokens_per_task;  // that follow each other, of a block or a cluster
  uint32_t tasks;
  int groups;   // short windows: groups of threads that share the rows of an entry
  int cluster;  // long windows: blocks that share the channels of an entry
};

constexpr CompressFlushPolicy compress_flush_policy(const Device& device, const CompressFlushProblem& problem) {
  const CompressFlushTuning& tuning = kCompressFlushTuning.of(device);
  const int64_t multiprocessors = device.multiprocessors;
  CompressFlushPolicy policy = {};
  if (problem.window <= kShortWindow) {
    policy.tokens_per_task = static_cast<int32_t>(blocks_for(problem.tokens, multiprocessors * tuning.short_blocks));
    policy.tasks = blocks_for(problem.tokens, policy.tokens_per_task);
    const bool at_once = policy.tasks * problem.threads <= multiprocessors * tuning.short_threads;
    policy.groups = at_once ? 2 : 1;
    return policy;
  }
  // A request's tokens, as far as one block of them: then no two entries of a request wait for each other.
  policy.tokens_per_task = static_cast<int32_t>(std::min<int64_t>(problem.tokens_per_request, problem.ratio));
  policy.tasks = blocks_for(problem.tokens, policy.tokens_per_task);
  // Many blocks per entry are the fastest while all run at once. Beyond, they cost more to start than they gain, most
  // of all where no entry completes.
  const bool resident = policy.tasks * int64_t{8} <= multiprocessors * tuning.long_blocks;
  policy.cluster = problem.head_dim == 128 ? 2 : resident ? 8 : 4;
  return policy;
}

}  // namespace dsv4
