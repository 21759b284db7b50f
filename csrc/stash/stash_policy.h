// Which kernel of paged_stash_copy and paged_stash_pop moves the pages, and its grid.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "core/policy.h"
#include "stash/bulk_ring.cuh"

namespace dsv4 {

struct StashTuning {
  int64_t bulk_bytes;   // from which bulk copies pay, of pages that fill a stage
  int64_t unit_blocks;  // per multiprocessor, of the kernel that moves units through registers
};

inline constexpr PerGeneration<StashTuning> kStashTuning = {
    // H100 (docs/decisions/0021): 512 MiB 2.98 TB/s by bulk copies, 99% of copy bandwidth; 1 MiB 3.2 us through
    // registers.
    {int64_t{8} << 20, 8},
    {int64_t{8} << 20, 8},  // copied from sm_90a, not measured
    {int64_t{8} << 20, 8},  // copied from sm_90a, not measured
};

struct StashPolicy {
  bool bulk;
  uint32_t blocks;
};

// vectors: whether everything is aligned to 16 bytes; else units are moved an element at a time.
constexpr StashPolicy stash_policy(const Device& device, const StashShape& shape, bool vectors) {
  constexpr int64_t kTooMuch = int64_t{1} << 43;  // spans are numbered in 32 bits
  constexpr int kReserved = 1024;                 // bytes of shared memory that a block takes beside its own
  const StashTuning& tuning = kStashTuning.of(device);
  const int64_t page_bytes = shape.page_size * shape.row_bytes, bytes = page_bytes * shape.needed_pages;
  if (vectors && page_bytes >= kStageBytes && bytes >= tuning.bulk_bytes && bytes < kTooMuch) {
    // As many blocks as are resident at a time: the counter that they draw from does the rest.
    const int fit = device.shared_per_block / (kRingBytes + 2 * kReserved);
    return {true, static_cast<uint32_t>(device.multiprocessors * std::clamp(fit, 1, kRingBlocks))};
  }
  // Enough blocks for every unit, or to fill the device. Any number is right.
  const int64_t unit = unit_bytes(vectors ? kVectorBytes : shape.element_bytes);
  const int64_t units = (page_bytes + unit - 1) / unit * shape.needed_pages;
  const int64_t fill = device.multiprocessors * tuning.unit_blocks;
  return {false, static_cast<uint32_t>(std::clamp<int64_t>((units + kUnitWarps - 1) / kUnitWarps, 1, fill))};
}

}  // namespace dsv4
