// How many lanes of a warp activation_topk gives a token.
#pragma once

#include "core/policy.h"

namespace dsv4 {

struct ActivationTopkTuning {
  int64_t few_tokens;  // up to which latency counts, and a warp per token has less of it; beyond, instructions
};

inline constexpr PerGeneration<ActivationTopkTuning> kActivationTopkTuning = {
    // H100 (docs/decisions/0011): 8192 tokens of half a warp each instead of a whole one took 8.5 to 6.4 us for 256
    // experts, 10.4 to 8.2 us for 384.
    {2048},
    {2048},  // copied from sm_90a, not measured
    {2048},  // copied from sm_90a, not measured
};

struct ActivationTopkProblem {
  int64_t tokens;
  bool can_halve;  // few results, and scores that are not sums over a row's lanes, whose order must not change
};

struct ActivationTopkPolicy {
  int lanes;  // of a token: 16 or 32
};

constexpr ActivationTopkPolicy activation_topk_policy(const Device& device, const ActivationTopkProblem& problem) {
  return {problem.can_halve && problem.tokens > kActivationTopkTuning.of(device).few_tokens ? 16 : 32};
}

}  // namespace dsv4
