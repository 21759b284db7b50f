// The dtypes of dsv4.h as C++ sees them.
#pragma once

#include <dsv4/dsv4.h>

namespace dsv4 {

// Bytes per stored element; 1 for values that are not a dsv4_dtype.
inline int dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case DSV4_INT64:
    case DSV4_FLOAT64: return 8;
    case DSV4_INT32:
    case DSV4_FLOAT32: return 4;
    case DSV4_FLOAT16:
    case DSV4_BFLOAT16: return 2;
    default: return 1;
  }
}

// Calls function with a zero of the C++ type of an index dtype, so that a launch can name its kernel's instantiation.
template <typename Function>
auto with_index_type(int32_t dtype, Function&& function) {
  return dtype == DSV4_INT64 ? function(int64_t{}) : function(int32_t{});
}

}  // namespace dsv4
