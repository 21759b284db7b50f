// Error texts: fail() records the text that dsv4_last_error() returns on this thread.
#pragma once

#include <dsv4/dsv4.h>

#include <cuda_runtime_api.h>

namespace dsv4 {

// Records "op: argument: text" (printf style after the argument) and returns `status`. argument may be null.
__attribute__((format(printf, 4, 5), cold)) dsv4_status fail(dsv4_status status, const char* op, const char* argument,
                                                             const char* format, ...);

// Converts a failed CUDA call into a status: no driver, no image, or another CUDA error.
__attribute__((cold)) dsv4_status fail_cuda(cudaError_t error, const char* op, const char* what);

}  // namespace dsv4
