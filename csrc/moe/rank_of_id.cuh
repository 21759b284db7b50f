// Which rank holds an expert.
#pragma once

#include <cstdint>

namespace dsv4 {

struct RankTable {
  const int32_t* ranks;  // of ids
  int64_t ids;

  // A negative number for ids outside the table. An entry may be any number.
  __device__ int32_t operator[](int64_t id) const { return id >= 0 && id < ids ? ranks[id] : -1; }
};

}  // namespace dsv4
