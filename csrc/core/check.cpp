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

// *bytes: from the first element to the end of the last row, gaps between rows included.
bool layout_matches(const dsv4_tensor& value, Layout layout, int64_t* bytes) {
  *bytes = 0;
  if (is_empty(value)) return true;  // nothing is ever addressed
  if (layout == Layout::kStrided) {
    const int64_t steps = value.shape[0] - 1;
    int64_t last;
    if (steps > 0 && value.stride[0] < 0) return false;
    if (__builtin_mul_overflow(steps, steps ? value.stride[0] : 0, &last)) return false;
    return !__builtin_mul_overflow(last, dtype_bytes(value.dtype), &last) &&
           !__builtin_add_overflow(last, dtype_bytes(value.dtype), bytes);
  }
  int64_t expected = 1;
  for (int i = value.rank - 1; i >= 0; --i) {
    const bool free_stride = layout == Layout::kStridedRows && i < value.rank - 1;
    // A row stride may be any size that does not make rows overlap; the stride of a single row is never used.
    if (value.shape[i] != 1 && (free_stride ? value.stride[i] < expected : value.stride[i] != expected)) return false;
    const int64_t step = free_stride && value.shape[i] != 1 ? value.stride[i] : expected;
    if (__builtin_mul_overflow(step, value.shape[i], &expected)) return false;
  }
  return !__builtin_mul_overflow(expected, dtype_bytes(value.dtype), bytes);
}

// What a tensor occupies: `count` pieces of `bytes`, `stride` bytes apart. Gaps inside a piece count as occupied.
struct Pieces {
  uintptr_t begin;
  int64_t bytes, stride, count;
};

Pieces pieces_of(const dsv4_tensor& value) {
  const int64_t element = dtype_bytes(value.dtype);
  Pieces pieces = {reinterpret_cast<uintptr_t>(value.data), element, element, 1};
  for (int i = value.rank - 1; i >= 0; --i) {
    if (value.shape[i] == 1 || value.stride[i] == 0) continue;
    pieces.bytes += (pieces.count - 1) * pieces.stride;
    pieces.stride = value.stride[i] * element;
    pieces.count = value.shape[i];
    if (pieces.stride != pieces.bytes) continue;
    pieces.bytes *= pieces.count;
    pieces.count = 1;
  }
  return pieces;
}

int64_t span_of(const Pieces& value) { return (value.count - 1) * value.stride + value.bytes; }

// Whether two tensors share a byte. Disjoint columns of one matrix do not. Exact, except for two tensors with different
// strides between pieces, for which overlapping spans count as sharing.
bool share_bytes(const Pieces& a, const Pieces& b) {
  if (a.count == 1 && b.count > 1) return share_bytes(b, a);
  const auto offset = static_cast<int64_t>(b.begin - a.begin);  // may be negative
  if (b.count == 1) {
    const int64_t first = offset < a.bytes ? 0 : (offset - a.bytes) / a.stride + 1;  // piece of `a` that ends behind it
    return first < a.count && first * a.stride < offset + b.bytes;
  }
  if (a.stride != b.stride) return offset < span_of(a) && -offset < span_of(b);
  // The first piece of `b` begins `into` bytes behind that of this number of `a`, if there is one.
  const int64_t number = offset / a.stride - (offset % a.stride < 0);
  const int64_t into = offset - number * a.stride;
  const auto meets = [&](int64_t first) { return first < a.count && first + b.count > 0; };
  return (into < a.bytes && meets(number)) || (into + b.bytes > a.stride && meets(number + 1));
}

// Both tensors have the same shape.
bool is_same_view(const dsv4_tensor& a, const dsv4_tensor& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i)
    if (a.shape[i] != b.shape[i] || (a.shape[i] != 1 && a.stride[i] != b.stride[i])) return false;
  return true;
}

dsv4_status bad_struct_size(const char* op, size_t expected, size_t got) {
  return fail(DSV4_ERROR_INVALID_ARGUMENT, op, "struct_size",
              "expected up to %zu, got %zu; set it to sizeof the struct, and build against headers no newer than the "
              "library (%s)",
              expected, got, dsv4_version());
}

// Recognised by the names that the headers give to outputs.
bool is_output(const char* name) {
  return (name[0] == 'o' && name[1] == 'u' && name[2] == 't') || (name[0] == 'w' && !std::strcmp(name, "workspace"));
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
  int64_t bytes;
  if (!layout_matches(value, layout, &bytes)) return bad_layout(name, value, layout);
  if (!value.data && bytes) {
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected a pointer to data, got NULL");
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(value.data);
  const uintptr_t misaligned = begin & static_cast<uintptr_t>(dtype_bytes(value.dtype) - 1);  // a power of two
  if (misaligned) {
    status_ =
        fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected data aligned to %d bytes, got an address %d beyond",
             dtype_bytes(value.dtype), static_cast<int>(misaligned));
    return;
  }
  if (bytes && seen_count_ < kMaxSeen)
    seen_[seen_count_++] = {begin, begin + static_cast<uintptr_t>(bytes), &value, name};
}

void Check::mark_changed(const dsv4_tensor& value) {
  for (int i = seen_count_ - 1; i >= 0; --i)
    if (seen_[i].tensor == &value) {
      changed_ |= uint32_t{1} << i;
      return;
    }
}

dsv4_status Check::check_overlaps() {
  const Seen* const end = seen_ + seen_count_;
  for (const Seen* written = seen_; written != end; ++written) {
    if (!is_output(written->name) && !(changed_ >> (written - seen_) & 1)) continue;
    for (const Seen* other = seen_; other != end; ++other)
      if (written->begin < other->end && other->begin < written->end && other != written)
        if (dsv4_status status = check_overlap(*written, *other)) return status;
  }
  return DSV4_OK;
}

dsv4_status Check::check_overlap(const Seen& written, const Seen& other) {
  if (written.tensor == in_place_[0] && other.tensor == in_place_[1] && is_same_view(*written.tensor, *other.tensor))
    return DSV4_OK;
  // An optional tensor may have been checked twice.
  if (written.tensor == other.tensor || !share_bytes(pieces_of(*written.tensor), pieces_of(*other.tensor)))
    return DSV4_OK;
  return fail(DSV4_ERROR_INVALID_ARGUMENT, op_, written.name,
              "expected memory that no other argument uses, got memory of %s; the op writes it, so give it a tensor of "
              "its own",
              other.name);
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
  if (dsv4_status status = check_overlaps()) return status;
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

dsv4_status write_struct(const char* op, const char* argument, const void* result, size_t size, void* given) {
  if (!given) return fail(DSV4_ERROR_INVALID_ARGUMENT, op, argument, "expected a struct to write to, got NULL");
  size_t known;
  std::memcpy(&known, given, sizeof(known));
  if (known < sizeof(known) || known > size) return bad_struct_size(op, size, known);
  std::memcpy(static_cast<char*>(given) + sizeof(known), static_cast<const char*>(result) + sizeof(known),
              known - sizeof(known));
  return DSV4_OK;
}

void Check::bad_struct(const void* given, size_t bytes, size_t expected) {
  if (status_) return;
  if (!given)
    status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, "args", "expected a pointer to the argument struct, got NULL");
  else
    status_ = bad_struct_size(op_, expected, bytes);
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
  // printf would show a NaN's sign, which means nothing. 9 digits distinguish any two floats; 6 are enough for most.
  char got[32];
  std::snprintf(got, sizeof(got), "%g", static_cast<double>(value));
  if (std::strtof(got, nullptr) != value) std::snprintf(got, sizeof(got), "%.9g", static_cast<double>(value));
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected a finite number%s, got %s", limit,
                 std::isnan(value) ? "nan" : got);
}

void Check::bad_layout(const char* name, const dsv4_tensor& value, Layout layout) {
  status_ = fail(DSV4_ERROR_INVALID_ARGUMENT, op_, name, "expected %s, got strides %s for shape %s; call .contiguous()",
                 layout == Layout::kContiguous ? "a contiguous tensor"
                 : layout == Layout::kStrided  ? "elements at a distance that is not negative"
                                               : "contiguous rows that do not overlap",
                 bracketed(value.stride, value.stride + value.rank).c_str(),
                 bracketed(value.shape, value.shape + value.rank).c_str());
}

}  // namespace dsv4
