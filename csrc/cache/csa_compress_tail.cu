#include "cache/pooled_rows.cuh"
#include "cache/tail.cuh"
#include "core/launch.h"

namespace dsv4 {

constexpr int kThreads = 64;    // small blocks, so that one request spreads over several multiprocessors
constexpr int kRowsAtOnce = 4;  // per stream: the models' m, so that all loads are in flight before the first use

// One thread per request and four columns; a request's blocks along y.
__global__ void __launch_bounds__(kThreads)
    csa_compress_tail_kernel(const float* __restrict__ ka, const float* __restrict__ za, const float* __restrict__ kb,
                             const float* __restrict__ zb, const int32_t* __restrict__ tail_len,
                             const int32_t* __restrict__ request_slots, __nv_bfloat16* __restrict__ entry,
                             __nv_bfloat16* __restrict__ indexer_key, bool* __restrict__ valid_mask, int64_t slots,
                             int rows, int width, int head_dim, int m) {
  await_previous_grid();
  const int64_t request = blockIdx.x;
  const int64_t slot = slot_of(request_slots, request, slots);
  const bool full = tail_is_full(tail_len, slot, m);
  if (blockIdx.y == 0 && threadIdx.x == 0) valid_mask[request] = full;
  const int column = (blockIdx.y * kThreads + threadIdx.x) * kFour;
  if (!full || column >= width) return;

  const int64_t first = slot * rows * width + column;
  PooledRows pooled;
  for (int row = 0; row < m; row += kRowsAtOnce) {
    Four<float> scores[2 * kRowsAtOnce];
    Four<float> values[2 * kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t at = first + static_cast<int64_t>(row + i) * width;
      scores[i] = scores[kRowsAtOnce + i] = masked_scores();
      if (row + i >= m) continue;
      scores[i] = *reinterpret_cast<const Four<float>*>(zb + at);
      values[i] = *reinterpret_cast<const Four<float>*>(kb + at);
      scores[kRowsAtOnce + i] = *reinterpret_cast<const Four<float>*>(za + at);
      values[kRowsAtOnce + i] = *reinterpret_cast<const Four<float>*>(ka + at);
    }
    pooled.add(scores, values);
  }
  if (column < head_dim)
    store_pooled(entry + request * head_dim + column, pooled);
  else
    store_pooled(indexer_key + request * (width - head_dim) + column - head_dim, pooled);
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_csa_compress_tail(const dsv4_csa_compress_tail_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("csa_compress_tail");
  const dsv4_csa_compress_tail_args args = check.read(given);
  const int64_t slots = extent(args.tail_ka, 0);
  const int64_t rows = extent(args.tail_ka, 1);
  const int64_t width = extent(args.tail_ka, 2);
  const int64_t requests = extent(args.request_slots, 0);
  const int64_t head_dim = extent(args.out_entry, 1);
  check_first_tail(check, "tail_ka", args.tail_ka);
  check_tail(check, "tail_za", args.tail_za, args.tail_ka);
  check_tail(check, "tail_kb", args.tail_kb, args.tail_ka);
  check_tail(check, "tail_zb", args.tail_zb, args.tail_ka);
  check.tensor("tail_len", args.tail_len, one_of(DSV4_INT32), {slots});
  check.tensor("request_slots", args.request_slots, one_of(DSV4_INT32), {kAny});
  check.range("m", args.m, 1, rows);
  check.tensor("out_entry", args.out_entry, one_of(DSV4_BFLOAT16), {requests, kAny});
  check.range("out_entry columns (head_dim)", head_dim, 0, width);
  check.multiple("out_entry columns (head_dim)", head_dim, kFour);
  check.aligned_rows("out_entry", args.out_entry, kFour * sizeof(__nv_bfloat16));
  check.tensor("out_indexer_key", args.out_indexer_key, one_of(DSV4_BFLOAT16), {requests, width - head_dim});
  check.aligned_rows("out_indexer_key", args.out_indexer_key, kFour * sizeof(__nv_bfloat16));
  check.tensor("out_valid_mask", args.out_valid_mask, one_of(DSV4_BOOL), {requests});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (requests == 0) return DSV4_OK;
  const dim3 grid(static_cast<uint32_t>(requests), std::max(1u, blocks_for(width, kThreads * kFour)));
  return launch<csa_compress_tail_kernel>(
      target, {grid, kThreads}, static_cast<const float*>(args.tail_ka.data),
      static_cast<const float*>(args.tail_za.data), static_cast<const float*>(args.tail_kb.data),
      static_cast<const float*>(args.tail_zb.data), static_cast<const int32_t*>(args.tail_len.data),
      static_cast<const int32_t*>(args.request_slots.data), static_cast<__nv_bfloat16*>(args.out_entry.data),
      static_cast<__nv_bfloat16*>(args.out_indexer_key.data), static_cast<bool*>(args.out_valid_mask.data), slots,
      static_cast<int>(rows), static_cast<int>(width), static_cast<int>(head_dim), args.m);
}
