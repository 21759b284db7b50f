#include "core/error.h"

#include <cstdarg>
#include <cstdio>

namespace dsv4 {
namespace {

constexpr size_t kErrorBytes = 1024;
thread_local char last_error[kErrorBytes] = "";

}  // namespace

dsv4_status fail(dsv4_status status, const char* op, const char* argument, const char* format, ...) {
  int used = argument ? std::snprintf(last_error, kErrorBytes, "%s: %s: ", op, argument)
                      : std::snprintf(last_error, kErrorBytes, "%s: ", op);
  if (used < 0 || static_cast<size_t>(used) >= kErrorBytes) return status;
  va_list values;
  va_start(values, format);
  std::vsnprintf(last_error + used, kErrorBytes - used, format, values);
  va_end(values);
  return status;
}

dsv4_status fail_cuda(cudaError_t error, const char* op, const char* what) {
  cudaGetLastError();  // the error is reported here; it must not surface again at an unrelated later call
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      cudaDriverGetVersion(&driver);
      if (driver == 0)
        return fail(DSV4_ERROR_NO_DRIVER, op, nullptr,
                    "needs a CUDA driver (R580 or later), found none on this machine");
      return fail(DSV4_ERROR_NO_DRIVER, op, nullptr,
                  "needs a CUDA 13 driver (R580 or later), found one for CUDA %d.%d; update the driver", driver / 1000,
                  driver % 1000 / 10);
    }
    case cudaErrorNoDevice:
      return fail(DSV4_ERROR_NO_DRIVER, op, nullptr,
                  "needs a CUDA device, found none (is one visible? see CUDA_VISIBLE_DEVICES)");
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
      return fail(DSV4_ERROR_NO_IMAGE, op, nullptr,
                  "the driver takes no image of this library for the device (%s: %s); it needs R580 or later", what,
                  cudaGetErrorName(error));
    default:
      return fail(DSV4_ERROR_CUDA, op, nullptr, "%s failed: %s (%s)", what, cudaGetErrorString(error),
                  cudaGetErrorName(error));
  }
}

}  // namespace dsv4

extern "C" const char* dsv4_last_error(void) { return dsv4::last_error; }
