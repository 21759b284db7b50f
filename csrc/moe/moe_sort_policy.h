// Which kernel of moe_sort takes so many slots and experts.
#pragma once

#include "core/launch.h"
#include "core/policy.h"

namespace dsv4 {

struct MoeSortLimits {
  int64_t few_slots;     // that a warp ranks without tables
  int64_t thread_slots;  // of a thread in a round
  int64_t warp_lanes;
  uint32_t cluster;  // blocks that share the slots, where one does not take them all
};

struct MoeSortTuning {
  int64_t slots_of_one_block;  // up to which a block is done sooner than a cluster
};

inline constexpr PerGeneration<MoeSortTuning> kMoeSortTuning = {
    // H100 (docs/decisions/0015): v4-flash, 1 / 16 / 128 / 1024 / 8192 tokens: 1.4 / 2.25 / 3.9 / 5.0 / 20.5 us.
    {1024},
    {1024},  // copied from sm_90a, not measured
    {1024},  // copied from sm_90a, not measured
};

struct MoeSortPolicy {
  bool few;            // the kernel without tables
  uint32_t blocks;     // 1, or a cluster
  int32_t part;        // slots of a block, a multiple of a warp's lanes
  int warps;           // of a block
  int thread_experts;  // experts whose counts a thread adds up
  bool one_round;      // whether a block ranks its slots at once
};

constexpr MoeSortPolicy moe_sort_policy(const Device& device, const MoeSortLimits& limits, int64_t slots,
                                        int64_t experts) {
  MoeSortPolicy policy = {};
  policy.few = slots <= limits.few_slots;
  policy.blocks = slots <= kMoeSortTuning.of(device).slots_of_one_block ? 1 : limits.cluster;
  policy.part = static_cast<int32_t>(blocks_for(slots, policy.blocks * limits.warp_lanes) * limits.warp_lanes);
  // A thread for each expert, or for four of them; twice the warps where 8 do not rank all slots in a round.
  const auto one_round = [&](int warps) { return policy.part <= warps * limits.warp_lanes * limits.thread_slots; };
  const bool four = experts > 512;
  policy.warps = four || (experts <= 256 && one_round(8)) ? 8 : 16;
  policy.thread_experts = four ? 4 : 1;
  policy.one_round = one_round(policy.warps);
  return policy;
}

}  // namespace dsv4
