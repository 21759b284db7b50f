// Tuning is data: csrc/<family>/<op>_policy.h holds, for each op that has a choice, a table of measured numbers and a
// pure function from device and problem to a named struct. tests/package/policies.txt records what they come to.
#pragma once

#include "core/device.h"

namespace dsv4 {

// A row of numbers for each generation of devices. Each row says what chose it: a measurement, with its device, or
// that it is a copy of another row, not measured.
template <typename Row>
struct PerGeneration {
  Row sm_90;   // H100, H200
  Row sm_100;  // sm_100, sm_103: B200, B300
  Row sm_120;  // sm_120, sm_121: RTX PRO 6000, GB10

  constexpr const Row& of_major(int major) const { return major == 9 ? sm_90 : major == 10 ? sm_100 : sm_120; }
  constexpr const Row& of(const Device& device) const { return of_major(architecture_of(device).major); }
};

}  // namespace dsv4
