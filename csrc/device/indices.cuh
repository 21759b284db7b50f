// Indices of either integer type.
#pragma once

#include <dsv4/dsv4.h>

#include <cstdint>

namespace dsv4 {

// An array of int32 or int64, distinguished at run time: for kernels that read few indices, one image serves both.
struct Indices {
  const void* data;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

inline Indices indices_of(const dsv4_tensor& tensor) { return {tensor.data, tensor.dtype == DSV4_INT64}; }

}  // namespace dsv4
