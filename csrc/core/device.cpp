#include "core/device.h"

#include <cuda.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>

#include "core/observer.h"

namespace dsv4 {
namespace {

std::string list_architectures() {
  std::string names;
  for (const Architecture& architecture : kArchitectures)
    names += (names.empty() ? "" : ", ") + std::string(architecture.name);
  return names;
}

// The index in kArchitectures of what runs on that compute capability, or -1.
int find_architecture(int major, int minor) {
  for (int i = 0; i < kArchitectureCount; ++i)
    if (kArchitectures[i].major == major && kArchitectures[i].minor == minor) return i;
  return -1;
}

dsv4_status read_device(const char* op, int ordinal, Device* device) {
  AllowLoadingInCapture allow;
  int count = 0;
  if (cudaError_t error = cudaGetDeviceCount(&count)) return fail_cuda(error, op, "cudaGetDeviceCount");
  if (ordinal < 0 || ordinal >= count || ordinal >= kMaxDevices)
    return fail(DSV4_ERROR_INVALID_ARGUMENT, op, "device", "expected 0 to %d, got %d",
                (count < kMaxDevices ? count : kMaxDevices) - 1, ordinal);
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                {cudaDevAttrComputeCapabilityMinor, &minor},
                {cudaDevAttrMultiProcessorCount, &device->multiprocessors},
                {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_per_block}};
  for (const auto& one : wanted)
    if (cudaError_t error = cudaDeviceGetAttribute(one.value, one.attribute, ordinal))
      return fail_cuda(error, op, "cudaDeviceGetAttribute");
  device->ordinal = ordinal;
  device->architecture = find_architecture(major, minor);
  if (device->architecture >= 0) return DSV4_OK;
  cudaDeviceProp properties;
  const bool named = cudaGetDeviceProperties(&properties, ordinal) == cudaSuccess;
  return fail(DSV4_ERROR_NO_IMAGE, op, nullptr,
              "no image for device %d (%s, compute capability %d.%d); this library holds images for %s", ordinal,
              named ? properties.name : "?", major, minor, list_architectures().c_str());
}

// The driver's context functions, looked up by name, as the library is not linked against the driver.
struct Contexts {
  decltype(&::cuDevicePrimaryCtxRetain) retain;
  decltype(&::cuCtxPushCurrent) push;
  decltype(&::cuCtxPopCurrent) pop;
  cudaError_t error;
};

const Contexts& contexts() {
  static const Contexts found = [] {
    constexpr unsigned kCudaVersion = 12000;  // the version of these functions' interfaces
    Contexts entries = {};
    const struct {
      const char* name;
      void** entry;
    } wanted[] = {{"cuDevicePrimaryCtxRetain", reinterpret_cast<void**>(&entries.retain)},
                  {"cuCtxPushCurrent", reinterpret_cast<void**>(&entries.push)},
                  {"cuCtxPopCurrent", reinterpret_cast<void**>(&entries.pop)}};
    for (const auto& one : wanted) {
      cudaDriverEntryPointQueryResult result;
      entries.error = cudaGetDriverEntryPointByVersion(one.name, one.entry, kCudaVersion, cudaEnableDefault, &result);
      if (!entries.error && result != cudaDriverEntryPointSuccess) entries.error = cudaErrorSymbolNotFound;
      if (entries.error) break;
    }
    return entries;
  }();
  return found;
}

}  // namespace

dsv4_status find_device(const char* op, int ordinal, const Device** device) {
  static Device devices[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  static std::mutex mutex;
  if (ordinal >= 0 && ordinal < kMaxDevices && known[ordinal].load(std::memory_order_acquire)) {
    *device = &devices[ordinal];
    return DSV4_OK;
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (ordinal >= 0 && ordinal < kMaxDevices && known[ordinal].load(std::memory_order_relaxed)) {
    *device = &devices[ordinal];  // filled by a thread that held the lock before, and already visible to others
    return DSV4_OK;
  }
  Device found = {};
  if (dsv4_status status = read_device(op, ordinal, &found)) return status;
  // read_device refuses every ordinal outside the array: fail() never returns DSV4_OK, which the analyzer does not see.
  devices[ordinal] = found;  // NOLINT(clang-analyzer-security.ArrayBound)
  known[ordinal].store(true, std::memory_order_release);
  *device = &devices[ordinal];
  return DSV4_OK;
}

dsv4_status LaunchTarget::open(const char* op_name, int ordinal, dsv4_stream on_stream) {
  op = op_name;
  stream = on_stream;
  if (const Device* emulated = emulated_device()) {
    device = emulated;
    return DSV4_OK;
  }
  if (dsv4_status status = find_device(op, ordinal, &device)) return status;
  int current = -1;
  if (cudaError_t error = cudaGetDevice(&current)) return fail_cuda(error, op, "cudaGetDevice");
  return current == ordinal ? DSV4_OK : enter(ordinal);
}

dsv4_status LaunchTarget::enter(int ordinal) {
  AllowLoadingInCapture allow;
  const Contexts& driver = contexts();
  if (driver.error) return fail_cuda(driver.error, op, "cudaGetDriverEntryPointByVersion");
  // Retained for the life of the process: the tensors' owner may release its own reference while work is enqueued.
  // Retained again if it was destroyed since (cudaDeviceReset).
  static std::atomic<CUcontext> retained[kMaxDevices];
  CUcontext context = retained[ordinal].load(std::memory_order_acquire);
  if (!context || driver.push(context) != CUDA_SUCCESS) {
    if (driver.retain(&context, ordinal) != CUDA_SUCCESS || driver.push(context) != CUDA_SUCCESS)
      return fail(DSV4_ERROR_CUDA, op, nullptr, "the primary context of device %d could not be made current", ordinal);
    retained[ordinal].store(context, std::memory_order_release);
  }
  entered_ = true;
  return DSV4_OK;
}

void LaunchTarget::leave() {
  CUcontext context;
  contexts().pop(&context);
}

}  // namespace dsv4
