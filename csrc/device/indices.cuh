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

  // In 32 bits: a number beyond them is the nearest that they hold.
  __device__ int32_t saturated(int64_t i) const {
    if (!wide) return static_cast<const int32_t*>(data)[i];
    const int64_t value = static_cast<const int64_t*>(data)[i];
    return static_cast<int32_t>(value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value);
  }
};

inline Indices indices_of(const dsv4_tensor& tensor) { return {tensor.data, tensor.dtype == DSV4_INT64}; }

// The same for elements that lie apart, such as a column of a matrix.
struct StridedIndices {
  Indices indices;
  int64_t stride;

  __device__ int64_t operator[](int64_t i) const { return indices[i * stride]; }
};

inline StridedIndices strided_indices_of(const dsv4_tensor& tensor) { return {indices_of(tensor), tensor.stride[0]}; }

// An array of int32 or int64 that a kernel writes.
struct OutIndices {
  void* data;
  bool wide;

  __device__ void store(int64_t i, int32_t value) const {
    if (wide)
      static_cast<int64_t*>(data)[i] = value;
    else
      static_cast<int32_t*>(data)[i] = value;
  }
};

inline OutIndices out_indices_of(const dsv4_tensor& tensor) { return {tensor.data, tensor.dtype == DSV4_INT64}; }

}  // namespace dsv4
