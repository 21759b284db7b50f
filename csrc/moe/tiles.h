// What the ops that make tiles of rows by expert have in common.
#pragma once

#include <cstdint>

namespace dsv4 {

constexpr bool is_tile_size(int64_t rows) { return rows == 16 || rows == 32 || rows == 64 || rows == 128; }

}  // namespace dsv4
