// Queries about the library itself: version, images, and whether a device can run it.
#include "core/check.h"
#include "core/images.h"
#include "core/kernel.h"

namespace dsv4 {
namespace {

constexpr int32_t kCurrentDevice = -1;

dsv4_status device_or_current(const char* op, int32_t ordinal, LaunchTarget* target) {
  if (ordinal == kCurrentDevice) {
    int current = 0;
    if (cudaError_t error = cudaGetDevice(&current)) return fail_cuda(error, op, "cudaGetDevice");
    ordinal = current;
  }
  return target->open(op, ordinal, nullptr);
}

}  // namespace
}  // namespace dsv4

extern "C" const char* dsv4_version(void) { return DSV4_VERSION; }

extern "C" dsv4_status dsv4_device_status(int32_t device) {
  dsv4::LaunchTarget target;
  return dsv4::device_or_current("device_status", device, &target);
}

extern "C" dsv4_status dsv4_preload(int32_t device) {
  dsv4::LaunchTarget target;
  if (dsv4_status status = dsv4::device_or_current("preload", device, &target)) return status;
  const void* handle = nullptr;
  for (dsv4::Kernel* kernel : dsv4::kernels())
    // NOLINTNEXTLINE(clang-analyzer-core.NonNullParamChecker): a target that opened has a device
    if (dsv4_status status = dsv4::load_kernel(*kernel, "preload", *target.device, &handle)) return status;
  return DSV4_OK;
}

extern "C" size_t dsv4_image_count(void) { return dsv4::image_count; }

extern "C" dsv4_status dsv4_image_at(size_t index, dsv4_image* image) {
  if (image && index >= dsv4::image_count)
    return dsv4::fail(DSV4_ERROR_INVALID_ARGUMENT, "image_at", "index", "expected an index below %zu, got %zu",
                      dsv4::image_count, index);
  return dsv4::write_struct("image_at", "image", image ? &dsv4::images[index] : nullptr, sizeof(*image), image);
}
