// Which device a call runs on, and which of the library's architectures fits it.
#pragma once

#include <cuda_runtime_api.h>

#include "architectures.h"
#include "core/error.h"

namespace dsv4 {

constexpr int kMaxDevices = 64;  // devices of one process; ordinals beyond are refused, not wrapped

struct Device {
  int ordinal;
  int architecture;      // index into kArchitectures
  int multiprocessors;   // for grids that fill the chip
  int shared_per_block;  // bytes of shared memory that a block can opt in to
};

constexpr const Architecture& architecture_of(const Device& device) { return kArchitectures[device.architecture]; }

// The properties of a device, read once. DSV4_ERROR_NO_IMAGE if the library holds nothing for it.
dsv4_status find_device(const char* op, int ordinal, const Device** device);

// What an op launches on. Makes the device current for as long as it lives, by its primary context on the thread's
// stack of contexts: cudaSetDevice() would, on the way back, create a context on the caller's device if it had none.
class LaunchTarget {
 public:
  LaunchTarget() = default;
  LaunchTarget(const LaunchTarget&) = delete;
  LaunchTarget& operator=(const LaunchTarget&) = delete;
  ~LaunchTarget() {
    if (entered_) leave();
  }

  dsv4_status open(const char* op, int ordinal, dsv4_stream stream);

  const char* op = nullptr;
  const Device* device = nullptr;
  cudaStream_t stream = nullptr;

 private:
  __attribute__((cold)) dsv4_status enter(int ordinal);
  __attribute__((cold)) static void leave();

  bool entered_ = false;  // whether the thread's stack holds a context of this call
};

// Allows calls that a stream capture forbids by default (loading an image) to be made while this thread captures:
// they touch no stream, so the capture does not see them.
class AllowLoadingInCapture {
 public:
  AllowLoadingInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AllowLoadingInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace dsv4
