#include "cache/page_layout.h"

#include "core/check.h"

extern "C" dsv4_status dsv4_page_layout_at(int32_t layout, dsv4_page_layout_info* info) {
  using namespace dsv4;
  if (layout < 0 || layout >= kPageLayoutCount)
    return fail(DSV4_ERROR_INVALID_ARGUMENT, "page_layout_at", "layout", "expected 0 to %d, got %d",
                kPageLayoutCount - 1, layout);
  return write_struct("page_layout_at", "info", &kPageLayouts[layout], sizeof(*info), info);
}

extern "C" size_t dsv4_page_bytes(int32_t layout, int64_t entries) {
  using namespace dsv4;
  constexpr int64_t kMostEntries = int64_t{1} << 48;  // whose bytes fit in 64 bits
  if (layout < 0 || layout >= kPageLayoutCount || entries < 0 || entries > kMostEntries) return 0;
  return static_cast<size_t>(page_bytes(kPageLayouts[layout], entries));
}
