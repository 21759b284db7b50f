// Launching: every kernel of every language is launched by launch_kernel(), which tests can observe.
#pragma once

#include <type_traits>
#include <utility>

#include "core/kernel.h"

namespace dsv4 {

struct Geometry {
  dim3 grid;
  dim3 block;
  uint32_t dynamic_shared = 0;  // bytes
  uint32_t cluster = 1;         // blocks per cluster, in x, for kernels that are compiled without a cluster size
};

// Every launch uses programmatic dependent launch (PDL): blocks may be scheduled while the previous kernel in the
// stream drains, which hides about 0.5 us of launch latency. In return every kernel waits for the previous grid before
// it touches memory, but for prefetches into L2; the build refuses one that does not (aot/images.py). In CUDA C++:
#ifdef __CUDACC__
// Ahead of what every kernel does, by every thread: waits until the previous grid is complete and its memory visible
// (griddepcontrol.wait), then lets the next grid's blocks be scheduled (griddepcontrol.launch_dependents). In this
// order at most one successor is resident.
__device__ __forceinline__ void await_previous_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#endif

// Launches `kernel` with `count` parameters of the given sizes. Returns before the kernel has run.
dsv4_status launch_kernel(Kernel& kernel, const LaunchTarget& target, const Geometry& geometry, void** parameters,
                          const uint32_t* sizes, uint32_t count);

// For an aot kernel the image decides block size and shared memory; the caller gives the grid.
dsv4_status launch_aot_kernel(Kernel& kernel, const LaunchTarget& target, dim3 grid, void** parameters,
                              const uint32_t* sizes, uint32_t count);

template <auto Function>
inline Kernel cuda_kernel{"cuda", reinterpret_cast<const void*>(Function), nullptr};

namespace detail {

template <auto Function, typename... Parameters>
dsv4_status launch_as(void (*)(Parameters...), const LaunchTarget& target, const Geometry& geometry,
                      std::decay_t<Parameters>... values) {
  void* parameters[] = {const_cast<void*>(static_cast<const void*>(&values))...};
  static constexpr uint32_t sizes[] = {sizeof(Parameters)...};
  return launch_kernel(cuda_kernel<Function>, target, geometry, parameters, sizes, sizeof...(Parameters));
}

}  // namespace detail

// Launches a CUDA C++ kernel: launch<my_kernel<float>>(target, {grid, block}, a, b, c). Arguments convert to the
// kernel's parameter types as in a plain call.
template <auto Function, typename... Values>
dsv4_status launch(const LaunchTarget& target, const Geometry& geometry, Values&&... values) {
  return detail::launch_as<Function>(Function, target, geometry, std::forward<Values>(values)...);
}

// Number of blocks of `block` items that cover `count`, as a grid dimension.
constexpr uint32_t blocks_for(int64_t count, int64_t block) {
  return static_cast<uint32_t>((count + block - 1) / block);
}

}  // namespace dsv4
