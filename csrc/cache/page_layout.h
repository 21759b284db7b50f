// The table of page layouts of the compressed cache. Python reads it through dsv4_page_layout_at().
//
// A page holds the values of its entries one after another, then the scales of its entries one after another. Of
// `separate` layouts it holds the quantised values only.
#pragma once

#include <dsv4/cache.h>

namespace dsv4 {

// The last `head_dim - quantized_dims` values of an entry are bfloat16. A scale of split is at least the smallest
// normal float32, so that a row of zeros is not divided by 0.
constexpr size_t kInfoBytes = sizeof(dsv4_page_layout_info);
constexpr dsv4_page_layout_info kPageLayouts[] = {
    // struct_size, name, head_dim, quantized_dims, element, group, scale, value_bytes, scale_bytes, page_alignment,
    // separate, amax_floor, exact_scale
    {kInfoBytes, "bf16", 512, 0, DSV4_BFLOAT16, 0, DSV4_ABSENT, 1024, 0, 1, 0, 0.0f, 0},
    {kInfoBytes, "indexer_bf16", 128, 0, DSV4_BFLOAT16, 0, DSV4_ABSENT, 256, 0, 1, 0, 0.0f, 0},
    // 7 scales and a byte of padding.
    {kInfoBytes, "fp8_ds_mla", 512, 448, DSV4_FLOAT8_E4M3FN, 64, DSV4_FLOAT8_E8M0FNU, 576, 8, 576, 0, 1e-4f, 0},
    {kInfoBytes, "indexer_fp8", 128, 128, DSV4_FLOAT8_E4M3FN, 128, DSV4_FLOAT32, 128, 4, 1, 0, 1e-4f, 0},
    {kInfoBytes, "indexer_mxfp4", 128, 128, DSV4_FLOAT4_E2M1FN_X2, 32, DSV4_FLOAT8_E8M0FNU, 64, 4, 1, 0, 0x1.8p-124f,
     0},
    {kInfoBytes, "v41_fp8", 512, 512, DSV4_FLOAT8_E4M3FN, 32, DSV4_FLOAT8_E8M0FNU, 512, 16, 512, 0, 1e-4f, 0},
    {kInfoBytes, "v41_fp4", 512, 512, DSV4_FLOAT4_E2M1FN_X2, 16, DSV4_FLOAT8_E4M3FN, 256, 32, 256, 0, 0x1.8p-7f, 0},
    {kInfoBytes, "split", 512, 448, DSV4_FLOAT8_E4M3FN, 448, DSV4_FLOAT32, 448, 4, 1, 1, 448 * 0x1p-126f, 1},
    {kInfoBytes, "split_indexer", 128, 128, DSV4_FLOAT4_E2M1FN_X2, 16, DSV4_FLOAT8_E4M3FN, 64, 8, 1, 1, 0.0f, 0},
};
constexpr int32_t kPageLayoutCount = sizeof(kPageLayouts) / sizeof(kPageLayouts[0]);

constexpr int64_t page_bytes(const dsv4_page_layout_info& layout, int64_t entries) {
  const int64_t bytes = entries * (layout.value_bytes + (layout.separate ? 0 : layout.scale_bytes));
  return (bytes + layout.page_alignment - 1) / layout.page_alignment * layout.page_alignment;
}

// Alignment that pages must have for the widest access to them.
constexpr int64_t page_access_bytes(const dsv4_page_layout_info& layout) {
  return layout.quantized_dims < layout.head_dim ? 8 : 4;
}

}  // namespace dsv4
