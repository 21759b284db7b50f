#include <cuda_bf16.h>
#include <dsv4/moe.h>

#include "core/check.h"
#include "core/launch.h"

namespace dsv4 {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // columns of a thread: 16 bytes
constexpr int kAtOnce = 6;  // rows in flight per thread before it adds the first: as many as the models have

struct alignas(16) Eight {
  __nv_bfloat16 values[kVector];
};

struct Combination {
  const __nv_bfloat16* rows;
  const int32_t* slot_to_row;
  const float* weights;           // or null: all 1
  const __nv_bfloat16* addition;  // or null
  __nv_bfloat16* out;
  int64_t row_count;
  int64_t row_stride;
  int64_t weights_stride;
  int64_t addition_stride;
  int64_t out_stride;
  int64_t columns;
  int32_t top_k;
};

template <bool Aligned>
__device__ Eight load_eight(const __nv_bfloat16* row, int64_t column, int64_t columns) {
  if constexpr (Aligned) {
    return *reinterpret_cast<const Eight*>(row + column);
  } else {
    Eight result;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      result.values[i] = column + i < columns ? row[column + i] : __float2bfloat16_rn(0.0f);
    return result;
  }
}

// A thread sums 8 columns of a token over its slots, in the slots' order: one rounding per product and sum, one at the
// end.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads, 3) moe_finalize_kernel(Combination c) {
  await_previous_grid();
  const int64_t token = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector;
  if (column >= c.columns) return;
  float sum[kVector] = {};
  for (int from = 0; from < c.top_k; from += kAtOnce) {
    // All rows' numbers first, then all rows: a number that is looked up between two rows makes each wait for the last.
    int32_t row[kAtOnce];
    float weight[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t slot = token * c.top_k + from + i;
      const bool has_slot = from + i < c.top_k;
      row[i] = has_slot ? c.slot_to_row[slot] : -1;
      weight[i] = has_slot && c.weights ? c.weights[token * c.weights_stride + from + i] : 1.0f;
    }
    Eight loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] >= c.row_count) row[i] = -1;
      if (row[i] >= 0) loaded[i] = load_eight<Aligned>(c.rows + int64_t{row[i]} * c.row_stride, column, c.columns);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] < 0) continue;
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fmaf(weight[i], __bfloat162float(loaded[i].values[j]), sum[j]);
    }
  }
  if (c.addition) {
    const Eight more = load_eight<Aligned>(c.addition + token * c.addition_stride, column, c.columns);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[j] += __bfloat162float(more.values[j]);
  }
  Eight result;
#pragma unroll
  for (int j = 0; j < kVector; ++j) result.values[j] = __float2bfloat16_rn(sum[j]);
  __nv_bfloat16* const out = c.out + token * c.out_stride + column;
  if constexpr (Aligned) {
    *reinterpret_cast<Eight*>(out) = result;
  } else {
    for (int j = 0; j < kVector && column + j < c.columns; ++j) out[j] = result.values[j];
  }
}

constexpr int64_t kMaxGridY = 65535;

static bool in_eights(const dsv4_tensor& tensor) {
  return !present(tensor) || (reinterpret_cast<uintptr_t>(tensor.data) % sizeof(Eight) == 0 &&
                              tensor.stride[0] % kVector == 0 && tensor.shape[1] % kVector == 0);
}
}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_finalize(const dsv4_moe_finalize_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_finalize");
  const dsv4_moe_finalize_args args = check.read(given);
  const int64_t columns = extent(args.rows, 1);
  const int64_t tokens = extent(args.slot_to_row, 0);
  const int64_t top_k = extent(args.slot_to_row, 1);
  check.tensor("rows", args.rows, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.range("rows columns", columns, 0, kMaxGridY * kThreads * kVector);
  check.tensor("slot_to_row", args.slot_to_row, one_of(DSV4_INT32), {kAny, kAny});
  check.range("slot_to_row rows (tokens)", tokens, 0, INT32_MAX);
  check.range("slot_to_row columns (top_k)", top_k, 1, DSV4_MAX_TOP_K);
  check.optional_tensor("weights", args.weights, one_of(DSV4_FLOAT32), {tokens, top_k}, Layout::kStridedRows);
  check.optional_tensor("shared", args.shared, one_of(DSV4_BFLOAT16), {tokens, columns}, Layout::kStridedRows);
  check.tensor("out", args.out, one_of(DSV4_BFLOAT16), {tokens, columns}, Layout::kStridedRows);
  check.in_place(args.out, args.shared);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0 || columns == 0) return DSV4_OK;
  Combination c = {};
  c.rows = static_cast<const __nv_bfloat16*>(args.rows.data);
  c.slot_to_row = static_cast<const int32_t*>(args.slot_to_row.data);
  c.weights = static_cast<const float*>(args.weights.data);
  c.addition = static_cast<const __nv_bfloat16*>(args.shared.data);
  c.out = static_cast<__nv_bfloat16*>(args.out.data);
  c.row_count = extent(args.rows, 0);
  c.row_stride = args.rows.stride[0];
  c.weights_stride = args.weights.stride[0];
  c.addition_stride = present(args.shared) ? args.shared.stride[0] : 0;
  c.out_stride = args.out.stride[0];
  c.columns = columns;
  c.top_k = static_cast<int32_t>(top_k);
  const dim3 grid(static_cast<uint32_t>(tokens), blocks_for(columns, kThreads * kVector));
  if (in_eights(args.rows) && in_eights(args.shared) && in_eights(args.out))
    return launch<moe_finalize_kernel<true>>(target, {grid, kThreads}, c);
  return launch<moe_finalize_kernel<false>>(target, {grid, kThreads}, c);
}
