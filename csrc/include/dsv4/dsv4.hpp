// The C interface in C++: errors as exceptions, tensors from typed pointers. Header only; adds nothing to the ABI.
//
//     auto args = dsv4::args<dsv4_hash_router_args>();
//     args.token_ids = dsv4::view(token_ids, {tokens}, device);
//     ...
//     dsv4::call(dsv4_hash_router, args, stream);  // throws dsv4::Error
#pragma once

#include <dsv4/dsv4.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dsv4 {

// A status that is not DSV4_OK, with the library's text.
class Error : public std::runtime_error {
 public:
  explicit Error(dsv4_status status) : std::runtime_error(dsv4_last_error()), status_(status) {}

  dsv4_status status() const { return status_; }

 private:
  dsv4_status status_;
};

inline void check(dsv4_status status) {
  if (status != DSV4_OK) throw Error(status);
}

// The dtype of a C++ type. Specialise it for types of your own:
//     template <> inline constexpr dsv4_dtype dsv4::dtype<half> = DSV4_FLOAT16;
template <typename T>
constexpr dsv4_dtype dtype = DSV4_UNSUPPORTED;
template <>
inline constexpr dsv4_dtype dtype<bool> = DSV4_BOOL;
template <>
inline constexpr dsv4_dtype dtype<uint8_t> = DSV4_UINT8;
template <>
inline constexpr dsv4_dtype dtype<int8_t> = DSV4_INT8;
template <>
inline constexpr dsv4_dtype dtype<int32_t> = DSV4_INT32;
template <>
inline constexpr dsv4_dtype dtype<int64_t> = DSV4_INT64;
template <>
inline constexpr dsv4_dtype dtype<float> = DSV4_FLOAT32;
template <>
inline constexpr dsv4_dtype dtype<double> = DSV4_FLOAT64;

// A contiguous tensor of a dtype that has no C++ type, such as DSV4_BFLOAT16. Throws std::invalid_argument for a shape
// of more than DSV4_MAX_RANK dimensions.
inline dsv4_tensor view(const void* data, dsv4_dtype type, std::initializer_list<int64_t> shape, int32_t device) {
  if (shape.size() > DSV4_MAX_RANK)
    throw std::invalid_argument("dsv4::view: expected up to " + std::to_string(DSV4_MAX_RANK) + " dimensions, got " +
                                std::to_string(shape.size()));
  dsv4_tensor tensor = {};
  tensor.data = const_cast<void*>(data);  // what an op reads and what it writes is in the op's description
  tensor.dtype = type;
  tensor.device = device;
  tensor.rank = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    tensor.shape[i] = shape.begin()[i];
    tensor.stride[i] = stride;
    stride *= tensor.shape[i];
  }
  return tensor;
}

// A contiguous tensor of the elements that the pointer points to.
template <typename T>
dsv4_tensor view(T* data, std::initializer_list<int64_t> shape, int32_t device) {
  static_assert(dtype<std::remove_cv_t<T>> != DSV4_UNSUPPORTED, "name the dtype: dsv4::view(data, DSV4_BFLOAT16, ...)");
  return view(data, dtype<std::remove_cv_t<T>>, shape, device);
}

// The argument struct of an op with nothing given yet.
template <typename Args>
Args args() {
  Args value = {};
  value.struct_size = sizeof(Args);
  return value;
}

// Calls an op; throws Error if it refuses.
template <typename Args>
void call(dsv4_status (*op)(const Args*, dsv4_stream), const Args& arguments, dsv4_stream stream) {
  check(op(&arguments, stream));
}

}  // namespace dsv4
