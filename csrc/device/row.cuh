// Rows of float32 or bfloat16, read four neighbouring columns at a time.
#pragma once

#include <cuda_bf16.h>
#include <dsv4/dsv4.h>

#include "core/dtype.h"

namespace dsv4 {

constexpr int kFour = 4;

template <typename T>
struct alignas(kFour * sizeof(T)) Four {
  T values[kFour];
};

// Whether rows can be read with vector loads: every group of four is aligned, and the columns are a multiple of four.
inline bool in_fours(const dsv4_tensor& tensor) {
  const int last = tensor.rank - 1;
  const uintptr_t bytes = kFour * static_cast<uintptr_t>(dtype_bytes(tensor.dtype));
  const bool rows_apart = last > 0 && tensor.shape[0] > 1;
  return reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0 && tensor.shape[last] % kFour == 0 &&
         (!rows_apart || tensor.stride[0] % kFour == 0);
}

// Columns `column` to `column + 3` of a row; 0 beyond its end. `fours` is what in_fours() said.
template <typename T>
__device__ inline Four<T> load_four(const T* row, int column, int columns, bool fours) {
  Four<T> result;
#pragma unroll
  for (int j = 0; j < kFour; ++j) result.values[j] = T(0.0f);
  if (fours) {
    if (column < columns) result = *reinterpret_cast<const Four<T>*>(row + column);
  } else {
#pragma unroll
    for (int j = 0; j < kFour; ++j)
      if (column + j < columns) result.values[j] = row[column + j];
  }
  return result;
}

// The layout of a row over a group of lanes (a warp or half of one): the column that a lane holds in a slot, ascending
// with the slot. The same with and without vector loads, so that sums over the lanes have one order.
template <int Lanes>
__device__ inline int group_column(int lane, int slot) {
  return (slot / kFour * Lanes + lane) * kFour + slot % kFour;
}

// Loads a lane's share of a row of up to Lanes * Slots columns; 0 beyond its end.
template <int Lanes, int Slots, typename T>
__device__ inline void load_group_row(const T* row, int lane, int columns, bool fours, float (&values)[Slots]) {
  Four<T> loaded[Slots / kFour];
#pragma unroll
  for (int i = 0; i < Slots / kFour; ++i)
    loaded[i] = load_four(row, group_column<Lanes>(lane, i * kFour), columns, fours);
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) values[slot] = static_cast<float>(loaded[slot / kFour].values[slot % kFour]);
}

// Stores values in the layout of load_group_row(), by column.
template <int Lanes, int Slots>
__device__ inline void store_group_row(const float (&values)[Slots], int lane, float* row) {
#pragma unroll
  for (int i = 0; i < Slots; i += kFour)
    *reinterpret_cast<Four<float>*>(row + group_column<Lanes>(lane, i)) = {values[i], values[i + 1], values[i + 2],
                                                                           values[i + 3]};
}

// Calls function with a zero of the C++ type of a float dtype that rows may have.
template <typename Function>
auto with_row_type(int32_t dtype, Function&& function) {
  return dtype == DSV4_BFLOAT16 ? function(__nv_bfloat16{}) : function(float{});
}

// Calls function with the number of slots per lane for rows of `columns` columns, as an integral constant. The models'
// gates have 256 and 384 experts.
template <typename Function>
auto with_slots(int64_t columns, Function&& function) {
  if (columns <= 256) return function(std::integral_constant<int, 8>{});
  if (columns <= 384) return function(std::integral_constant<int, 12>{});
  if (columns <= 512) return function(std::integral_constant<int, 16>{});
  return function(std::integral_constant<int, 32>{});
}

constexpr int64_t kMaxWarpColumns = 1024;  // of with_slots()

}  // namespace dsv4
