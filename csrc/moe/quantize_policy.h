// The grid of the ops that quantise and dequantise: every value is read and written once.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "core/policy.h"

namespace dsv4 {

constexpr int kQuantizeThreads = 256;

struct QuantizeTuning {
  // In the grid, at most: about ten waves, so that blocks that end early make room for others, and few enough that
  // their start costs little.
  int64_t blocks_per_multiprocessor;
};

inline constexpr PerGeneration<QuantizeTuning> kQuantizeTuning = {
    // H100, best of 4 to all for nearly every op (docs/decisions/0007): NVFP4 of 16384 x 7168 103.0 us, 115.0 with 4
    // and 112.7 with all. On an H200 the same grid reaches 71 to 78% of its copy bandwidth.
    {64},
    {64},  // copied from sm_90a, not measured
    {64},  // copied from sm_90a, not measured
};

// Blocks for so many items of a thread each; at least one.
constexpr uint32_t quantize_blocks(const Device& device, int64_t items) {
  const int64_t fill = device.multiprocessors * kQuantizeTuning.of(device).blocks_per_multiprocessor;
  return static_cast<uint32_t>(std::clamp<int64_t>(blocks_for(items, kQuantizeThreads), 1, fill));
}

}  // namespace dsv4
