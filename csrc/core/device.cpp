#include "core/device.h"

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>

#include "core/observer.h"
#include "kernels.h"

namespace dsv4 {
namespace {

std::string list_architectures() {
  std::string names;
  for (const Architecture& architecture : kArchitectures)
    names += (names.empty() ? "" : ", ") + std::string(architecture.name);
  return names;
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

}  // namespace

int find_architecture(int major, int minor) {
  for (int i = 0; i < kArchitectureCount; ++i)
    if (kArchitectures[i].major == major && kArchitectures[i].minor == minor) return i;
  return -1;
}

dsv4_status find_device(const char* op, int ordinal, const Device** device) {
  static Device devices[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  static std::mutex mutex;
  if (ordinal >= 0 && ordinal < kMaxDevices && known[ordinal].load(std::memory_order_acquire)) {
    *device = &devices[ordinal];
    return DSV4_OK;
  }
  std::lock_guard<std::mutex> lock(mutex);
  Device found = {};
  if (dsv4_status status = read_device(op, ordinal, &found)) return status;
  devices[ordinal] = found;
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
  if (current == ordinal) return DSV4_OK;
  if (cudaError_t error = cudaSetDevice(ordinal)) return fail_cuda(error, op, "cudaSetDevice");
  previous_ = current;
  return DSV4_OK;
}

}  // namespace dsv4
