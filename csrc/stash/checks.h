// What the arguments of both ops have in common.
#pragma once

#include <dsv4/stash.h>

#include "core/check.h"
#include "core/dtype.h"

namespace dsv4 {

constexpr int64_t kMaxPageSize = 65536;
constexpr int64_t kMaxPageBytes = int64_t{1} << 40;
constexpr size_t kCounterBytes = 16;  // of workspace: one counter, and a size that no allocator finds odd

// Extents and sizes that the checks agreed on.
struct StashShape {
  int64_t rows;
  int64_t element_bytes;  // of which all data is a multiple away from address 0
  int64_t row_bytes;
  int64_t page_size;
  int64_t cuda_pages;
  int64_t host_pages;    // 0 without a host pool
  int64_t needed_pages;  // if every row is used
};

inline void check_one(Check& check, const char* name, const dsv4_tensor& value) {
  if (value.rank == 0)
    check.tensor(name, value, one_of(DSV4_INT64), {});
  else
    check.tensor(name, value, one_of(DSV4_INT64), {1});
}

// The pools, their lists and the rows; names are those of the op's arguments.
inline StashShape check_pools(Check& check, const char* rows_name, const dsv4_tensor& rows, const char* cuda_name,
                              const dsv4_tensor& cuda_pool, const char* host_name, const dsv4_tensor& host_pool,
                              const dsv4_tensor& free_list_cuda, const dsv4_tensor& free_list_host,
                              const dsv4_tensor& page_record) {
  constexpr DtypeSet kAnyDtype = (DtypeSet{1} << DSV4_UNSUPPORTED) - 2;  // all but absent
  StashShape shape = {};
  shape.rows = extent(rows, 0);
  shape.page_size = extent(cuda_pool, 1);
  shape.cuda_pages = extent(cuda_pool, 0);
  shape.host_pages = present(host_pool) ? extent(host_pool, 0) : 0;
  shape.element_bytes = dtype_bytes(rows.dtype);
  shape.row_bytes = extent(rows, 1) * shape.element_bytes;
  check.tensor(rows_name, rows, kAnyDtype, {kAny, kAny});
  if (check.status()) return shape;
  check.range("hidden", extent(rows, 1), 1, INT32_MAX);
  check.tensor(cuda_name, cuda_pool, one_of(rows.dtype), {kAny, kAny, extent(rows, 1)});
  check.range("page_size", shape.page_size, 1, kMaxPageSize);
  check.range("bytes of a page", shape.page_size * shape.row_bytes, 1, kMaxPageBytes);
  if (check.status()) return shape;
  shape.needed_pages = (shape.rows + shape.page_size - 1) / shape.page_size;
  check.range("pages of all rows", shape.needed_pages, 0, INT32_MAX);
  if (present(host_pool))
    check.device_or_pinned_tensor(host_name, host_pool, one_of(rows.dtype), {kAny, shape.page_size, extent(rows, 1)});
  check.tensor("free_list_cuda", free_list_cuda, one_of(DSV4_INT64), {shape.cuda_pages});
  if (present(host_pool) || present(free_list_host))
    check.tensor("free_list_host", free_list_host, one_of(DSV4_INT64), {shape.host_pages});
  check.tensor("page_record", page_record, one_of(DSV4_INT64), {kAny});
  check.range("page_record entries", extent(page_record, 0), shape.needed_pages, INT64_MAX);
  return shape;
}

// Where the op leaves an end of the lists: in place, or in a tensor that may be the same one.
inline void check_advanced(Check& check, const dsv4_tensor& old_end, const dsv4_tensor& new_end) {
  if (!present(new_end))
    check.changes(old_end);
  else if (new_end.data != old_end.data)
    check.changes(new_end);
}

inline void check_workspace(Check& check, const dsv4_tensor& workspace) {
  check.tensor("workspace", workspace, one_of(DSV4_UINT8), {kAny});
  check.range("workspace bytes", extent(workspace, 0), static_cast<int64_t>(kCounterBytes), INT64_MAX);
  check.aligned_rows("workspace", workspace, static_cast<int64_t>(kCounterBytes));
}

}  // namespace dsv4
