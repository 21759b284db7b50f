// Shared by the hash routing ops: which table row a token takes, and the checks of these arguments.
#pragma once

#include <dsv4/router.h>

#include "core/check.h"
#include "device/indices.cuh"

namespace dsv4 {

constexpr int32_t kNoExpert = -1;  // the id of a slot without an expert

// The table row of a token, or -1 for padding and for ids outside the table.
__device__ inline int64_t lookup_row(const StridedIndices& token_ids, const bool* padding_mask, int64_t token,
                                     int64_t vocab) {
  const int64_t id = token_ids[token];
  const bool padding = padding_mask && padding_mask[token];
  return padding || id < 0 || id >= vocab ? -1 : id;
}

// Lanes per token, one slot each: the smallest power of two that is at least top_k.
inline int group_for(int top_k) {
  int group = 1;
  while (group < top_k) group *= 2;
  return group;
}

// Args is the struct of a hash routing op; returns k.
template <typename Args>
int64_t check_hash_lookup(Check& check, const Args& args) {
  const int64_t tokens = extent(args.token_ids, 0);
  const int64_t top_k = extent(args.hash_lut, 1);
  check.tensor("token_ids", args.token_ids, one_of(DSV4_INT32, DSV4_INT64), {kAny}, Layout::kStrided);
  check.tensor("hash_lut", args.hash_lut, one_of(DSV4_INT32, DSV4_INT64), {kAny, kAny});
  check.range("hash_lut columns (k)", top_k, 1, DSV4_MAX_TOP_K);
  check.optional_tensor("padding_mask", args.padding_mask, one_of(DSV4_BOOL), {tokens});
  check.tensor("out_weights", args.out_weights, one_of(DSV4_FLOAT32), {tokens, top_k});
  check.tensor("out_ids", args.out_ids, one_of(DSV4_INT32, DSV4_INT64), {tokens, top_k});
  return top_k;
}

}  // namespace dsv4
