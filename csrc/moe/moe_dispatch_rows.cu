#include <dsv4/moe.h>

#include "core/check.h"
#include "core/dtype.h"
#include "core/launch.h"
#include "moe/rank_of_id.cuh"

namespace dsv4 {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;     // loads of 16 bytes in flight per thread
constexpr int64_t kPart = 16;  // bytes that each part of a row is a multiple of

struct DispatchRows {
  const char* x;
  const char* scale;  // or null
  const float* weights;
  RankTable rank_of_id;
  const int32_t* place_to_slot;
  char* out;
  int64_t x_stride, scale_bytes, row_bytes;  // bytes
  int32_t x_vectors, scale_room;             // of 16 bytes; bytes of the scales' part
  int32_t slots, top_k, capacity, routes;
};

// A block for each row.
template <typename Id>
__global__ void __launch_bounds__(kThreads) moe_dispatch_rows_kernel(const Id* __restrict__ ids, DispatchRows rows) {
  await_previous_grid();
  const int32_t place = blockIdx.x;
  const int32_t slot = rows.place_to_slot[place];
  char* const out = rows.out + place * rows.row_bytes;
  char* const scale_out = out + int64_t{rows.x_vectors} * kPart;
  int32_t* const ids_out = reinterpret_cast<int32_t*>(scale_out + rows.scale_room);
  const int thread = threadIdx.x;
  if (slot < 0 || slot >= rows.slots) {
    if (thread < rows.routes) ids_out[thread] = -1;
    return;
  }
  const int64_t token = slot / rows.top_k;
  const uint4* const x = reinterpret_cast<const uint4*>(rows.x + token * rows.x_stride);
  uint4* const x_out = reinterpret_cast<uint4*>(out);
#pragma unroll 1
  for (int32_t first = thread; first < rows.x_vectors; first += kAtOnce * kThreads) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < rows.x_vectors) values[i] = x[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < rows.x_vectors) x_out[first + i * kThreads] = values[i];
  }
  const char* const scale = rows.scale + token * rows.scale_bytes;
#pragma unroll 1
  for (int32_t i = thread; i < rows.scale_room; i += kThreads) scale_out[i] = i < rows.scale_bytes ? scale[i] : 0;
  const int32_t room = (rows.routes + 3) / 4 * 4;  // words of ids, and of weights
  int32_t id = 0;
  float weight = 0.0f;
  if (thread < rows.routes) {
    const int64_t own = rows.routes == 1 ? slot : token * rows.top_k + thread;
    const int64_t given = ids[own];
    id = rows.rank_of_id[given] == place / rows.capacity ? static_cast<int32_t>(given) : -1;
    weight = rows.weights[own];
  }
  if (thread < room) {
    ids_out[thread] = id;
    reinterpret_cast<float*>(ids_out + room)[thread] = weight;
  }
}

static int64_t part(int64_t bytes) { return (bytes + kPart - 1) / kPart * kPart; }
}  // namespace dsv4

extern "C" dsv4_status dsv4_moe_dispatch_rows(const dsv4_moe_dispatch_rows_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("moe_dispatch_rows");
  const dsv4_moe_dispatch_rows_args args = check.read(given);
  const int64_t tokens = extent(args.topk_ids, 0);
  const int64_t top_k = extent(args.topk_ids, 1);
  const int64_t places = extent(args.place_to_slot, 0);
  const int64_t x_bytes = extent(args.x, 1), scale_bytes = present(args.scale) ? extent(args.scale, 1) : 0;
  check.tensor("x", args.x, one_of(DSV4_UINT8), {tokens, kAny}, Layout::kStridedRows);
  check.range("x columns (bytes)", x_bytes, kPart, INT32_MAX);
  check.multiple("x columns (bytes)", x_bytes, kPart);
  check.aligned_rows("x", args.x, kPart);
  check.optional_tensor("scale", args.scale, one_of(DSV4_UINT8), {tokens, kAny});
  check.range("scale columns (bytes)", scale_bytes, 0, INT32_MAX / 2);
  check.tensor("topk_weights", args.topk_weights, one_of(DSV4_FLOAT32), {tokens, top_k});
  check.tensor("topk_ids", args.topk_ids, one_of(DSV4_INT32, DSV4_INT64), {kAny, kAny});
  check.range("topk_ids columns (top_k)", top_k, 1, DSV4_MAX_TOP_K);
  check.range("topk_ids elements", saturating_product(tokens, top_k), 0, int64_t{1} << 30);
  check.tensor("rank_of_id", args.rank_of_id, one_of(DSV4_INT32), {kAny});
  check.tensor("place_to_slot", args.place_to_slot, one_of(DSV4_INT32), {kAny});
  check.range("place_to_slot elements", places, 0, INT32_MAX);
  check.range("capacity", args.capacity, 1, INT32_MAX);
  check.require(args.routes == 1 || args.routes == top_k, "routes", "1 or top_k", args.routes);
  const int64_t row_bytes = part(x_bytes) + part(scale_bytes) + 2 * part(4 * int64_t{args.routes});
  check.tensor("out", args.out, one_of(DSV4_UINT8), {places, row_bytes});
  check.aligned_rows("out", args.out, kPart);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (places == 0) return DSV4_OK;
  DispatchRows rows = {};
  rows.x = static_cast<const char*>(args.x.data);
  rows.scale = static_cast<const char*>(args.scale.data);
  rows.weights = static_cast<const float*>(args.topk_weights.data);
  rows.rank_of_id = {static_cast<const int32_t*>(args.rank_of_id.data), extent(args.rank_of_id, 0)};
  rows.place_to_slot = static_cast<const int32_t*>(args.place_to_slot.data);
  rows.out = static_cast<char*>(args.out.data);
  rows.x_stride = args.x.stride[0];
  rows.scale_bytes = scale_bytes;
  rows.row_bytes = row_bytes;
  rows.x_vectors = static_cast<int32_t>(x_bytes / kPart);
  rows.scale_room = static_cast<int32_t>(part(scale_bytes));
  rows.slots = static_cast<int32_t>(tokens * top_k);
  rows.top_k = static_cast<int32_t>(top_k);
  rows.capacity = args.capacity;
  rows.routes = args.routes;
  return with_index_type(args.topk_ids.dtype, [&](auto id) {
    using Id = decltype(id);
    return launch<moe_dispatch_rows_kernel<Id>>(target, {static_cast<uint32_t>(places), kThreads},
                                                static_cast<const Id*>(args.topk_ids.data), rows);
  });
}
