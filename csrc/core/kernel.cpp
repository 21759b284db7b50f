#include "core/kernel.h"

#include <mutex>

namespace dsv4 {
namespace {

std::vector<Kernel*>& all_kernels() {
  static std::vector<Kernel*> list;
  return list;
}

std::vector<CudaFunction>& registered() {
  static std::vector<CudaFunction> functions;
  return functions;
}

// Lets blocks of this kernel use all the dynamic shared memory that the device offers. Also forces a function that CUDA
// would load lazily to be loaded now.
dsv4_status prepare_function(const void* handle, const char* op, const Device& device) {
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, handle))
    return fail_cuda(error, op, "loading a kernel (cudaFuncGetAttributes)");
  const int dynamic = device.shared_per_block - static_cast<int>(attributes.sharedSizeBytes);
  if (attributes.maxDynamicSharedSizeBytes >= dynamic) return DSV4_OK;
  if (cudaError_t error = cudaFuncSetAttribute(handle, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic))
    return fail_cuda(error, op, "cudaFuncSetAttribute");
  return DSV4_OK;
}

}  // namespace

Kernel::Kernel(const char* language_name, const void* function, const AotImage* aot_images)
    : language(language_name), host_function(function), images(aot_images) {
  all_kernels().push_back(this);
}

const std::vector<Kernel*>& kernels() { return all_kernels(); }

dsv4_status load_kernel(Kernel& kernel, const char* op, const Device& device, const void** handle) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  std::atomic<const void*>& slot = kernel.handle[device.ordinal];
  *handle = slot.load(std::memory_order_acquire);
  if (*handle) return DSV4_OK;

  AllowLoadingInCapture allow;
  cudaLibrary_t library = nullptr;
  if (kernel.host_function) {
    *handle = kernel.host_function;
  } else {
    const AotImage& image = kernel.images[device.architecture];
    if (cudaError_t error = cudaLibraryLoadData(&library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0))
      return fail_cuda(error, op, "cudaLibraryLoadData");
    cudaKernel_t loaded;
    if (cudaError_t error = cudaLibraryGetKernel(&loaded, library, image.symbol)) {
      cudaLibraryUnload(library);
      return fail_cuda(error, op, "cudaLibraryGetKernel");
    }
    *handle = loaded;
  }
  if (dsv4_status status = prepare_function(*handle, op, device)) {
    if (library) cudaLibraryUnload(library);
    return status;
  }
  slot.store(*handle, std::memory_order_release);
  return DSV4_OK;
}

const std::vector<CudaFunction>& cuda_functions() { return registered(); }

}  // namespace dsv4

// nvcc's generated code registers each kernel with the CUDA runtime through this function when the library is loaded.
// The linker (--wrap) redirects those calls here first, so the list of kernels and names is the compiler's own, and
// building it needs no driver, which cudaFuncGetName would.
extern "C" void __real___cudaRegisterFunction(void** fat_binary, const char* host_function, char* device_function,
                                              const char* device_name, int thread_limit, uint3* thread_id,
                                              uint3* block_id, dim3* block, dim3* grid, int* warp_size);
extern "C" void __wrap___cudaRegisterFunction(void** fat_binary, const char* host_function, char* device_function,
                                              const char* device_name, int thread_limit, uint3* thread_id,
                                              uint3* block_id, dim3* block, dim3* grid, int* warp_size) {
  dsv4::registered().push_back({host_function, device_name});
  __real___cudaRegisterFunction(fat_binary, host_function, device_function, device_name, thread_limit, thread_id,
                                block_id, block, grid, warp_size);
}
