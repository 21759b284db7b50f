// A kernel of any language, and how it is loaded for launching.
//
// CUDA C++ kernels live in the library's fat binary and are registered by the code that nvcc generates. Triton and CuTe
// DSL kernels are images that the aot step compiled; the build embeds them (kernels.cpp, generated).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/device.h"

namespace dsv4 {

// One compiled image of an aot kernel.
struct AotImage {
  const char* symbol;
  const unsigned char* data;
  uint32_t dynamic_shared;  // bytes per block
  uint32_t threads;         // per block
};

// Every kernel is a static object, and in the list of all kernels from the start of the process.
struct Kernel {
  Kernel(const char* language, const void* host_function, const AotImage* images);
  Kernel(const Kernel&) = delete;

  const char* language;
  const void* host_function;  // CUDA C++: the address that nvcc's registration knows; null for aot kernels
  const AotImage* images;     // aot kernels: one for each of kArchitectures; null for CUDA C++
  std::atomic<const void*> handle[kMaxDevices] = {};  // what cudaLaunchKernelExC takes, once loaded on that device
};

const std::vector<Kernel*>& kernels();

// The handle of a kernel on a device; loads it at the first call, during a stream capture too.
dsv4_status load_kernel(Kernel& kernel, const char* op, const Device& device, const void** handle);

struct CudaFunction {
  const void* host_function;
  const char* symbol;  // the kernel's name inside its images
};

// Every CUDA C++ kernel of the library.
const std::vector<CudaFunction>& cuda_functions();

}  // namespace dsv4
