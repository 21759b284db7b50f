// Which device a call runs on, and which of the library's architectures fits it.
#pragma once

#include <cuda_runtime_api.h>

#include "core/error.h"

namespace dsv4 {

constexpr int kMaxDevices = 64;  // devices of one process; ordinals beyond are refused, not wrapped

struct Device {
  int ordinal;
  int architecture;      // index into kArchitectures
  int multiprocessors;   // for grids that fill the chip
  int shared_per_block;  // bytes of shared memory that a block can opt in to
};

// The facts of a device, read once. DSV4_ERROR_NO_IMAGE if the library holds nothing for it.
dsv4_status find_device(const char* op, int ordinal, const Device** device);

// What an op launches on. Makes the device current for as long as it lives.
class LaunchTarget {
 public:
  LaunchTarget() = default;
  LaunchTarget(const LaunchTarget&) = delete;
  LaunchTarget& operator=(const LaunchTarget&) = delete;
  ~LaunchTarget() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }

  dsv4_status open(const char* op, int ordinal, dsv4_stream stream);

  const char* op = nullptr;
  const Device* device = nullptr;
  cudaStream_t stream = nullptr;

 private:
  int previous_ = -1;  // the device to return to, or -1
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
