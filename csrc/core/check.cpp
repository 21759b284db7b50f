#include "core/check.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/dtype.h"
#include "core/observer.h"

namespace dsv4 {
namespace {

std::string bracketed(const int64_t* begin, const int64_t* end) {
  std::string text = "[";
  for (const int64_t* value = begin; value != end; ++value) {
    if (value != begin) text += ", ";
    text += *value == kAny ? "any" : std::to_string(*value);
  }
  return text + "]";
}

std::string device_name(int32_t device) { return device == DSV4_HOST ? "cpu" : "cuda:" + std::to_string(device); }

bool shape_matches(const dsv4_tensor& value, std::initializer_list<int64_t> shape) {
  if (value.rank != static_cast<int32_t>(shape.size())) return false;
  const int64_t* actual = value.shape;
  for (int64_t expected : shape) {
    if (*actual < 0 || (expected != kAny && *actual != expected)) return false;
    ++actual;
  }
  return true;
}

bool is_empty(const dsv4_tensor& value) {
  for (int i = 0; i < value.rank; ++i)
    if (value.shape[i] == 0) return true;
  return false;
}

bool layout_matches(const dsv4_tensor& value, Layout layout) {
  if (is_empty(value)) return true;  // nothing is ever addressed
  int64_t expected = 1;
  for (int i = value.rank - 1; i >= 0; --i) {
    const bool free_stride = layout == Layout::kStridedRows && i < value.rank - 1;
    // A row stride may be any size that does not make rows overlap; the stride of a single row is never used.
    if (value.shape[i] != 1 && (free_stride ? value.stride[i] < expected : value.stride[i] != expected)) return false;
    expected = free_stride && value.shape[i] != 1 ? value.stride[i] * value.shape[i] : expected * value.shape[i];
  }
  return true;
}

}  // namespace

void Check::described(const char* name, const dsv4_tensor& value, DtypeSet dtypes, std::initializer_list<int64_t> shape,
                      Layout layout) {
  if (value.dtype < 0 || value.dtype >= 32 || !(dtypes >> value.dtype & 1)) return bad_dtype(name, value.dtype, dtypes);
  if (value.reserved != 0) {
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected 0 in the reserved field, got %d", value.reserved);
    return;
  }
  if (!shape_matches(value, shape)) return bad_shape(name, value, shape);
  if (!layout_matches(value, layout)) return bad_layout(name, value, layout);
  if (!value.data && !is_empty(value)) {
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected a pointer to data, got NULL");
    return;
  }
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(value.data) % dtype_bytes(value.dtype);
  if (misaligned)
    status_ =
        fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected data aligned to %d bytes, got an address %d beyond",
             dtype_bytes(value.dtype), static_cast<int>(misaligned));
}

void Check::tensor(const char* name, const dsv4_tensor& value, DtypeSet dtypes, std::initializer_list<int64_t> shape,
                   Layout layout) {
  if (status_) return;
  described(name, value, dtypes, shape, layout);
  if (status_) return;
  if (!first_tensor_) {
    first_tensor_ = name;
    device_ = value.device;
  } else if (device_ != value.device) {
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected device %s (where %s is), got %s",
                   device_name(device_).c_str(), first_tensor_, device_name(value.device).c_str());
  }
}

void Check::device_or_pinned_tensor(const char* name, const dsv4_tensor& value, DtypeSet dtypes,
                                    std::initializer_list<int64_t> shape, Layout layout) {
  if (status_) return;
  if (value.device != DSV4_HOST) return tensor(name, value, dtypes, shape, layout);
  described(name, value, dtypes, shape, layout);
}

void Check::aligned_rows(const char* name, const dsv4_tensor& value, int64_t bytes) {
  if (status_ || is_empty(value)) return;
  const int64_t element = dtype_bytes(value.dtype);
  const int64_t row = value.rank > 1 && value.shape[0] > 1 ? value.stride[0] * element : 0;
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(value.data) % static_cast<uintptr_t>(bytes));
  if (address || row % bytes)
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name,
                   "expected rows aligned to %lld bytes, got an address %lld beyond and rows %lld bytes apart; call "
                   ".contiguous() on a fresh tensor",
                   static_cast<long long>(bytes), static_cast<long long>(address), static_cast<long long>(row));
}

void Check::range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (status_ || (value >= low && value <= high)) return;
  const auto printed = [](int64_t number) { return static_cast<long long>(number); };
  if (low == high)
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected %lld, got %lld", printed(low), printed(value));
  else if (high == INT64_MAX)
    status_ =
        fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected at least %lld, got %lld", printed(low), printed(value));
  else
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected %lld to %lld, got %lld", printed(low),
                   printed(high), printed(value));
}

void Check::multiple(const char* name, int64_t value, int64_t of) {
  if (status_ || value % of == 0) return;
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected a multiple of %lld, got %lld",
                 static_cast<long long>(of), static_cast<long long>(value));
}

void Check::number(const char* name, float value, float low) {
  if (status_ || (value >= low && value <= FLT_MAX)) return;
  bad_number(name, value, low);
}

void Check::given(const char* name, const dsv4_tensor& value, const char* when) {
  if (status_ || present(value)) return;
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "must be given %s", when);
}

void Check::absent(const char* name, const dsv4_tensor& value, const char* when) {
  if (status_ || !present(value)) return;
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "must be omitted %s", when);
}

dsv4_status Check::open(dsv4_stream stream, LaunchTarget* target) {
  if (status_) return status_;
  if (device_ == DSV4_HOST && !emulated_device())
    return fail(DSV4_ERROR_HOST_TENSOR, op_, first_tensor_,
                "expected a CUDA tensor, got cpu; the Python package holds the CPU implementation");
  return target->open(op_, device_, stream);
}

dsv4_status Check::reachable(const char* name, const dsv4_tensor& value) {
  if (!present(value) || value.device != DSV4_HOST || is_empty(value) || emulated_device()) return DSV4_OK;
  AllowLoadingInCapture allow;
  cudaPointerAttributes attributes = {};
  if (cudaError_t error = cudaPointerGetAttributes(&attributes, value.data))
    return fail_cuda(error, op_, "cudaPointerGetAttributes");
  if (attributes.type != cudaMemoryTypeUnregistered) return DSV4_OK;
  return fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name,
              "expected CUDA memory or pinned host memory, got pageable host memory; allocate it with pin_memory=True");
}

void Check::bad_struct(const void* given, size_t bytes, size_t expected) {
  if (status_) return;
  if (!given)
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, "args", "expected a pointer to the argument struct, got NULL");
  else
    status_ =
        fail(DSV4_ERROR_INVALID_ARGUMENT, op_, "struct_size",
             "expected up to %zu, got %zu; set it to sizeof the struct, and build against headers no newer than the "
             "library (%s)",
             expected, bytes, dsv4_version());
}

void Check::bad_dtype(const char* name, int32_t dtype, DtypeSet dtypes) {
  if (dtype == DSV4_ABSENT) {
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected a tensor, got none");
    return;
  }
  std::string need;
  for (int32_t i = 0; i < 32; ++i)
    if (dtypes >> i & 1) need += (need.empty() ? "" : " or ") + std::string(dsv4_dtype_name(i));
  status_ =
      fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected dtype %s, got %s", need.c_str(), dsv4_dtype_name(dtype));
}

void Check::bad_shape(const char* name, const dsv4_tensor& value, std::initializer_list<int64_t> shape) {
  if (value.rank < 0 || value.rank > DSV4_MAX_RANK) {
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected rank %zu, got rank %d", shape.size(), value.rank);
    return;
  }
  status_ =
      fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected shape %s, got %s",
           bracketed(shape.begin(), shape.end()).c_str(), bracketed(value.shape, value.shape + value.rank).c_str());
}

void Check::bad_value(const char* name, const char* need, long long got) {
  if (status_) return;
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected %s, got %lld", need, got);
}

void Check::bad_number(const char* name, float value, float low) {
  char limit[48] = "";
  if (low != -FLT_MAX) std::snprintf(limit, sizeof(limit), " of at least %g", static_cast<double>(low));
  // A NaN's sign, which printf shows, means nothing. 9 digits tell any two floats apart; 6 are enough for most.
  char got[32];
  std::snprintf(got, sizeof(got), "%g", static_cast<double>(value));
  if (std::strtof(got, nullptr) != value) std::snprintf(got, sizeof(got), "%.9g", static_cast<double>(value));
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected a finite number%s, got %s", limit,
                 std::isnan(value) ? "nan" : got);
}

void Check::bad_layout(const char* name, const dsv4_tensor& value, Layout layout) {
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected %s, got strides %s for shape %s; call .contiguous()",
                 layout == Layout::kContiguous ? "a contiguous tensor" : "contiguous rows that do not overlap",
                 bracketed(value.stride, value.stride + value.rank).c_str(),
                 bracketed(value.shape, value.shape + value.rank).c_str());
}

}  // namespace dsv4
