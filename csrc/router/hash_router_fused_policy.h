// When hash_router_fused pays, and how it shares out a token's work.
#pragma once

#include "core/policy.h"

namespace dsv4 {

// Bytes of gate rows (tokens * top_k * hidden_size bfloat16) up to which hash_router_fused is faster than cuBLAS and
// hash_router_scored. H100, us (docs/decisions/0009): 341 tokens of v4-flash 7.9 against 9.4 and 512 tokens 10.2
// against 10.0; v4-pro 9.8 against 14.5 and 13.2 against 12.9. One number for all devices, as callers choose by it
// while they trace, without a device; not measured on sm_100a and sm_120a.
constexpr int64_t kHashRouterFusedMaxBytes = int64_t{16} << 20;

struct HashRouterFusedPolicy {
  int blocks;  // of a token, 1 to 8; a cluster
};

// The whole device for a small batch: as many blocks as leave each a multiprocessor. The bits do not depend on it.
// H100: 1 token of v4-flash 2.5 us, where 64 of v4-pro take 3.2 us for the rows' way through L2 alone
// (docs/decisions/0009); not measured on sm_100a and sm_120a.
constexpr HashRouterFusedPolicy hash_router_fused_policy(const Device& device, int64_t tokens) {
  for (int blocks : {8, 4, 2})
    if (tokens * blocks <= device.multiprocessors) return {blocks};
  return {1};
}

}  // namespace dsv4
