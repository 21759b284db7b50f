// Sends values from the blocks of a cluster to one of them, by st.async, which signals the receiver's mbarrier: a
// release at cluster scope would also wait for the thread's accesses to global memory.
#pragma once

#include <cstdint>

namespace dsv4 {

// An mbarrier in the shared memory of the receiving block: completes once the expected bytes have been stored with
// store_to_block().
struct ByteBarrier {
  uint64_t state;
};

__device__ inline uint32_t shared_address(const void* variable) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(variable));
}

// Called by one thread of the receiving block. The other blocks may store after the next cluster barrier.
__device__ inline void expect_bytes(ByteBarrier* barrier, uint32_t bytes) {
  const uint32_t address = shared_address(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

// Stores to the same variable as `place` in the cluster's block number `block`, which sees it after the next cluster
// barrier.
__device__ inline void store_to_block(float* place, float value, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote_place;\n"
      "mapa.shared::cluster.u32 remote_place, %0, %2;\n"
      "st.shared::cluster.f32 [remote_place], %1;\n"
      "}" ::"r"(shared_address(place)),
      "f"(value), "r"(block)
      : "memory");
}

// Stores to the same variable as `place` in the cluster's block number `block`, and counts it at that block's barrier.
__device__ inline void store_to_block(float* place, float value, ByteBarrier* barrier, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote_place, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote_place, %0, %3;\n"
      "mapa.shared::cluster.u32 remote_barrier, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [remote_place], %1, [remote_barrier];\n"
      "}" ::"r"(shared_address(place)),
      "f"(value), "r"(shared_address(barrier)), "r"(block)
      : "memory");
}

// Called by the receiving block: returns when all expected bytes have arrived; once in the life of the barrier. As for
// bulk copies, the default scope (block) is enough: the data is in its own shared memory.
__device__ inline void wait_for_bytes(ByteBarrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], 0;\n"
      "@!complete bra again;\n"
      "}" ::"r"(shared_address(barrier))
      : "memory");
}

}  // namespace dsv4
