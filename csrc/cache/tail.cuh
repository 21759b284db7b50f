// What the ops of the tail-counting state share: which slot a request owns, and whether its tail is full.
#pragma once

#include <dsv4/cache.h>

#include "core/check.h"

namespace dsv4 {

constexpr int64_t kMaxWidth = 65532;  // columns of a tail buffer, far beyond any model

// The slot of a request, or -1 for padding.
__device__ inline int64_t slot_of(const int32_t* request_slots, int64_t request, int64_t slots) {
  const int32_t slot = request_slots[request];
  return slot < 0 || slot >= slots ? -1 : slot;
}

// A request is ready when its tail holds a whole block.
__device__ inline bool tail_is_full(const int32_t* tail_len, int64_t slot, int m) {
  return slot >= 0 && tail_len[slot] >= m;
}

// Checks a tail buffer: the first one's shape, and rows aligned for reads of four columns.
inline void check_tail(Check& check, const char* name, const dsv4_tensor& tail, const dsv4_tensor& like) {
  check.tensor(name, tail, one_of(DSV4_FLOAT32), {extent(like, 0), extent(like, 1), extent(like, 2)});
  check.aligned_rows(name, tail, 4 * sizeof(float));
}

// Checks the first tail buffer, which decides the state's extents.
inline void check_first_tail(Check& check, const char* name, const dsv4_tensor& tail) {
  check.tensor(name, tail, one_of(DSV4_FLOAT32), {kAny, kAny, kAny});
  check.multiple("tail buffer columns (width)", extent(tail, 2), 4);
  check.range("tail buffer columns (width)", extent(tail, 2), 0, kMaxWidth);
  check.aligned_rows(name, tail, 4 * sizeof(float));
}

// next_kb and next_zb: both or neither. A given one is checked before a missing one is reported.
template <typename Args>
void check_next_rows(Check& check, const Args& args) {
  if (present(args.next_kb)) check_tail(check, "next_kb", args.next_kb, args.tail_ka);
  if (present(args.next_zb) || present(args.next_kb)) check_tail(check, "next_zb", args.next_zb, args.tail_ka);
  if (present(args.next_zb)) check_tail(check, "next_kb", args.next_kb, args.tail_ka);
}

// The blocks of a slot are the grid's second dimension, which is limited.
inline void check_blocks_of_slot(Check& check, int64_t slot_columns, int64_t columns_per_block) {
  check.range("tail buffer elements of a slot (rows * width)", slot_columns, 0, 65535 * columns_per_block);
}

}  // namespace dsv4
