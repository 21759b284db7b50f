// Copies of 16 bytes from global to shared memory that go on beside the thread (cp.async), in groups that complete in
// order. What a thread has copied, it sees itself once it has waited.
#pragma once

#include <cstdint>

namespace dsv4 {

__device__ inline void copy_async(void* to_shared, const void* from) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Prefetches a 128-byte line of global memory, or nothing. Reads nothing and jumps nowhere, so it may come before
// await_previous_grid().
__device__ inline void prefetch_into_l2(const void* line, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %1, 0;\n"
      "@wanted prefetch.global.L2 [%0];\n"
      "}" ::"l"(line),
      "r"(static_cast<uint32_t>(wanted)));
}

// Ends a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than `pending` groups of this thread, the youngest ones, are on their way. A constant of 0 to 3,
// which the compiler finds out: the instruction has it built in.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (pending == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (pending == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
}

}  // namespace dsv4
