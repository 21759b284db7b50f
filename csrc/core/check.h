// Argument checks of an op. Each check is skipped once one has failed, so an entry point reads as a plain list of what
// the op takes, and the first failure is the one that is reported.
#pragma once

#include <cfloat>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "core/device.h"
#include "core/error.h"

namespace dsv4 {

using DtypeSet = uint32_t;

// A caller's dtype may be any number; one that no set can represent is in no set.
template <typename... Dtypes>
constexpr DtypeSet one_of(Dtypes... dtypes) {
  return ((dtypes >= 0 && dtypes < 32 ? DtypeSet{1} << dtypes : DtypeSet{0}) | ...);
}

// The product of two extents, 0 or more, that nothing has checked: INT64_MAX where it is larger.
inline int64_t saturating_product(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

constexpr int64_t kAny = -1;  // any extent

enum class Layout {
  kContiguous,   // C order without gaps
  kStridedRows,  // the innermost dimension is contiguous, rows may lie apart
  kStrided,      // of one dimension: elements at any distance, 0 too; for tensors that are only read
};

inline bool present(const dsv4_tensor& tensor) { return tensor.dtype != DSV4_ABSENT; }

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // A copy of the caller's struct, so that a caller built against an older header (a shorter struct) gets zeros, that
  // is: absent, for the fields it does not know.
  template <typename Args>
  Args read(const Args* given) {
    size_t bytes = 0;
    if (given) std::memcpy(&bytes, given, sizeof(bytes));
    if (bytes == sizeof(Args)) return *given;  // no need to zero first
    Args args = {};
    if (bytes < sizeof(size_t) || bytes > sizeof(Args)) {
      bad_struct(given, bytes, sizeof(Args));
      return args;
    }
    std::memcpy(&args, given, bytes);
    return args;
  }

  // The tensor must be given, with one of these dtypes and this shape, on the device of the tensors checked before.
  void tensor(const char* name, const dsv4_tensor& value, DtypeSet dtypes, std::initializer_list<int64_t> shape,
              Layout layout = Layout::kContiguous);

  void optional_tensor(const char* name, const dsv4_tensor& value, DtypeSet dtypes,
                       std::initializer_list<int64_t> shape, Layout layout = Layout::kContiguous) {
    if (present(value)) tensor(name, value, dtypes, shape, layout);
  }

  // The op writes these tensors, which were checked before; may be absent. Not needed for the workspace and for those
  // whose name begins with "out".
  template <typename... Tensors>
  void changes(const Tensors&... tensors) {
    (mark_changed(tensors), ...);
  }

  // `output` may be `input` itself: the same elements in the same places. A part of it is refused like any other.
  void in_place(const dsv4_tensor& output, const dsv4_tensor& input) { in_place_[0] = &output, in_place_[1] = &input; }

  // The same for memory that the device may also reach in the host: on the device of the tensors checked before, or
  // pinned (page-locked) host memory, which has one address for the host and for every device. The tensor does not say
  // whether host memory is pinned: reachable() asks CUDA, once the device is open.
  void device_or_pinned_tensor(const char* name, const dsv4_tensor& value, DtypeSet dtypes,
                               std::initializer_list<int64_t> shape, Layout layout = Layout::kContiguous);

  // Rows start on a multiple of `bytes`, as vector loads of the kernel need.
  void aligned_rows(const char* name, const dsv4_tensor& value, int64_t bytes);

  void range(const char* name, int64_t value, int64_t low, int64_t high);
  void multiple(const char* name, int64_t value, int64_t of);
  void flag(const char* name, int32_t value) { range(name, value, 0, 1); }

  // A finite number, of at least `low`.
  void number(const char* name, float value, float low = -FLT_MAX);

  // The tensor must be given, or must not be. `when` completes "must be given <when>" and "must be omitted <when>".
  void given(const char* name, const dsv4_tensor& value, const char* when);
  void absent(const char* name, const dsv4_tensor& value, const char* when);

  // Any other condition. `need` and `got` complete "expected <need>, got <got>".
  template <typename Number>
  void require(bool holds, const char* name, const char* need, Number got) {
    static_assert(std::is_integral_v<Number>, "for floats there is number()");
    if (!holds) bad_value(name, need, static_cast<long long>(got));
  }

  dsv4_status status() const { return status_; }

  // Ends the checks: refuses memory that the op writes and another tensor uses too, and opens the device that the
  // tensors live on.
  dsv4_status open(dsv4_stream stream, LaunchTarget* target);

  // After open(): refuses host memory that is not pinned, which a kernel could not read.
  dsv4_status reachable(const char* name, const dsv4_tensor& value);

 private:
  __attribute__((cold)) void bad_struct(const void* given, size_t bytes, size_t expected);
  // Everything about a tensor but the device that it is on.
  void described(const char* name, const dsv4_tensor& value, DtypeSet dtypes, std::initializer_list<int64_t> shape,
                 Layout layout);
  void mark_changed(const dsv4_tensor& value);
  __attribute__((cold)) void bad_dtype(const char* name, int32_t dtype, DtypeSet dtypes);
  __attribute__((cold)) void bad_shape(const char* name, const dsv4_tensor& value,
                                       std::initializer_list<int64_t> shape);
  __attribute__((cold)) void bad_value(const char* name, const char* need, long long got);
  __attribute__((cold)) void bad_number(const char* name, float value, float low);
  __attribute__((cold)) void bad_layout(const char* name, const dsv4_tensor& value, Layout layout);

  const char* op_;
  dsv4_status status_ = DSV4_OK;
  const char* first_tensor_ = nullptr;
  int32_t device_ = DSV4_HOST;

  // The tensors that were checked, with the addresses that they span, and a bit for each that changes() named.
  struct Seen {
    uintptr_t begin, end;
    const dsv4_tensor* tensor;
    const char* name;
  };
  dsv4_status check_overlaps();
  __attribute__((cold)) dsv4_status check_overlap(const Seen& written, const Seen& other);
  static constexpr int kMaxSeen = 32;
  uint32_t changed_ = 0;
  const dsv4_tensor* in_place_[2] = {};
  int seen_count_ = 0;
  Seen seen_[kMaxSeen];
};

// Copies `size` bytes of a result, except its struct_size, to a caller's struct, whose own struct_size says which
// fields the caller knows.
dsv4_status write_struct(const char* op, const char* argument, const void* result, size_t size, void* given);

// An extent; safe to read before the tensor has been checked.
inline int64_t extent(const dsv4_tensor& tensor, int dimension) {
  return dimension < tensor.rank && dimension < DSV4_MAX_RANK ? tensor.shape[dimension] : 0;
}

}  // namespace dsv4
