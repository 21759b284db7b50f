// The grids of the four padded activations.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "core/policy.h"

namespace dsv4 {

// Blocks of the grid per multiprocessor, at most: several times what it holds, so that the hardware balances them, and
// few enough to be gone at once where n_used is small.
struct PaddedActivationsTuning {
  int64_t squared_relu, swiglu, squared_relu_mxfp8, swiglu_mxfp8;
};

inline constexpr PerGeneration<PaddedActivationsTuning> kPaddedActivationsTuning = {
    // H100, 16384 x 3072 (docs/decisions/0007): padded_squared_relu 74.6 us with one wave, 71.0 with two, 70.0 with
    // four; 100 used rows of it 2.3 us with one wave, 3.6 with four. squared_relu_and_quantize_mxfp8 53.9 us,
    // swiglu_and_quantize_mxfp8 89.8.
    {24, 32, 24, 24},
    {24, 32, 24, 24},  // copied from sm_90a, not measured
    {24, 32, 24, 24},  // copied from sm_90a, not measured
};

// Columns on axis 0, groups of rows on axis 1; the same whatever n_used is. Constants: of the kernel, for its tile.
template <typename Constants>
constexpr dim3 padded_grid(const Device& device, int64_t PaddedActivationsTuning::* blocks, int64_t rows,
                           int64_t columns, const Constants& tile) {
  constexpr int64_t kMaxGridY = 65535;
  const uint32_t across = blocks_for(columns, tile.columns);
  const int64_t most = device.multiprocessors * (kPaddedActivationsTuning.of(device).*blocks) / across;
  const int64_t down = std::clamp<int64_t>(most, 1, kMaxGridY);
  return dim3(across, static_cast<uint32_t>(std::min<int64_t>(blocks_for(rows, tile.rows), down)));
}

}  // namespace dsv4
