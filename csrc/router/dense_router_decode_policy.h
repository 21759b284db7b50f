// Which specialisation of dense_router_decode takes a batch, and how the product is spread over the device.
#pragma once

#include <algorithm>

#include "core/policy.h"
#include "kernels.h"

namespace dsv4 {

using DecodeKernel = aot::DenseRouterDecodeKernel;
using DecodeConstants = DecodeKernel::Constants;

// What holds of every specialisation on every architecture.
constexpr DecodeConstants kDecode = aot::kDenseRouterDecodeKernels[0]->constants[0];

// The largest of a constant over all specialisations.
constexpr int64_t largest_of(int32_t DecodeConstants::* constant) {
  int64_t most = 0;
  for (const DecodeKernel* kernel : aot::kDenseRouterDecodeKernels)
    most = std::max<int64_t>(most, kernel->constants[0].*constant);
  return most;
}

struct DenseRouterDecodePolicy {
  const DecodeKernel* kernel;
  uint32_t expert_tiles;
  uint32_t splits;  // parts of hidden_size
};

// The smallest specialisation that takes experts and tokens. hidden_size is split into as many parts as leave no more
// than one block per multiprocessor: H100, 8 tiles of experts x 16 parts, 3.9 / 4.3 / 5.0 us for 1 / 16 / 64 tokens of
// v4-flash (docs/decisions/0010); not measured on sm_100a and sm_120a. By shapes and device alone, for the order of the
// sums must not change between calls.
constexpr DenseRouterDecodePolicy dense_router_decode_policy(const Device& device, int64_t tokens, int64_t experts,
                                                             int64_t hidden_size) {
  const DecodeKernel* chosen = nullptr;
  for (const DecodeKernel* kernel : aot::kDenseRouterDecodeKernels) {
    const DecodeConstants& takes = kernel->on(device);
    if (experts > takes.max_experts || tokens > takes.max_tokens) continue;
    if (chosen && chosen->on(device).max_experts < takes.max_experts) continue;
    if (chosen && chosen->on(device).max_experts == takes.max_experts &&
        chosen->on(device).max_tokens < takes.max_tokens)
      continue;
    chosen = kernel;
  }
  const DecodeConstants& constants = chosen->on(device);
  const uint32_t expert_tiles = blocks_for(experts, constants.tile_experts);
  const int64_t most = std::min<int64_t>(constants.max_splits, hidden_size / constants.unit);
  const int64_t splits = std::clamp<int64_t>(device.multiprocessors / expert_tiles, 1, most);
  return {chosen, expert_tiles, static_cast<uint32_t>(splits)};
}

}  // namespace dsv4
