#include "cache/tail.cuh"
#include "core/launch.h"
#include "device/divide.cuh"
#include "device/row.cuh"

namespace dsv4 {

constexpr int kThreads = 128;
constexpr int kFewRows = 4;  // so few rows of bias are all loaded before it is known which one applies

// Rows of new tokens: head_dim columns from one pair of matrices, the rest of the width from another.
struct TokenRows {
  const float* values;
  const float* scores;
  const float* ape;  // null for none
  int64_t values_stride;
  int64_t scores_stride;
  int columns;  // per stream
};

struct NewTokens {
  TokenRows entry;
  TokenRows indexer;
  const int32_t* request_slots;
  const int64_t* positions;
  const int32_t* token_offsets;  // null: one token per request
  int64_t tokens;
  int64_t requests;
};

struct Tail {
  float* values[2];  // of the streams in the order of a token's columns: b of the current block, then a; or a alone
  float* scores[2];
  int32_t* length;
  int64_t* positions;
  int64_t slots;
  int rows;
  int width;
  int streams;
};

// The request that brings a token, and that token's number in the request; -1 for none. Every thread must call it.
__device__ inline int64_t request_of(const NewTokens& given, int64_t token, int64_t* number, bool* is_last) {
  if (!given.token_offsets) {
    *number = 0;
    *is_last = true;
    return token < given.requests ? token : -1;
  }
  __shared__ int64_t found[3];
  if (threadIdx.x == 0) found[0] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < given.requests; i += kThreads) {
    const int64_t begin = given.token_offsets[i];
    const int64_t end = given.token_offsets[i + 1];
    if (begin <= token && token < end) {
      found[0] = i;
      found[1] = token - begin;
      found[2] = token + 1 == end;
    }
  }
  __syncthreads();
  if (found[0] < 0) return -1;
  *number = found[1];
  *is_last = found[2] != 0;
  return found[0];
}

// One block per token and kThreads groups of four columns. What a token writes follows from its position alone, and one
// token of each request writes the request's counters: no block reads what another one writes. The token's columns are
// loaded speculatively, together with the loads that decide whether they are needed.
__global__ void __launch_bounds__(kThreads) append_kernel(NewTokens given, Tail tail, LongDivisor m, int round) {
  await_previous_grid();
  const int64_t token = blockIdx.x;
  const int at = (blockIdx.y * kThreads + threadIdx.x) * kFour;
  const bool has_columns = at < tail.streams * tail.width;
  const int stream = at >= tail.width;
  const int column = at - stream * tail.width;
  const bool in_entry = column < given.entry.columns;
  const TokenRows& from = in_entry ? given.entry : given.indexer;
  const int source = stream * from.columns + column - (in_entry ? 0 : given.entry.columns);
  Four<float> values = {};
  Four<float> scores = {};
  Four<float> biases[kFewRows] = {};
  const bool few_rows = m.value <= kFewRows;
  const int64_t bias_row = static_cast<int64_t>(tail.streams) * from.columns;
  const bool has_bias = has_columns && from.ape;
  if (has_columns) {
    values = *reinterpret_cast<const Four<float>*>(from.values + token * from.values_stride + source);
    scores = *reinterpret_cast<const Four<float>*>(from.scores + token * from.scores_stride + source);
  }
#pragma unroll
  for (int i = 0; i < kFewRows; ++i)
    if (has_bias && few_rows && i < m.value)
      biases[i] = *reinterpret_cast<const Four<float>*>(from.ape + i * bias_row + source);

  int64_t number = 0;
  bool is_last = false;
  const int64_t request = request_of(given, token, &number, &is_last);
  if (request < 0) return;
  const int64_t slot = slot_of(given.request_slots, request, tail.slots);
  const int64_t start = given.positions[request];
  if (slot < 0 || start < 0) return;
  const int64_t row = start + number - (m.quotient(start) + round) * m.value;  // in the block of this round
  if (row < 0 || row >= m.value) return;
  if (blockIdx.y == 0 && threadIdx.x == 0 && (is_last || row == m.value - 1)) {
    tail.length[slot] = static_cast<int32_t>(row) + 1;
    tail.positions[slot] = start + number + 1;
  }
  if (!has_columns) return;
  if (has_bias) {
    Four<float> bias = biases[0];
    if (!few_rows) bias = *reinterpret_cast<const Four<float>*>(from.ape + row * bias_row + source);
#pragma unroll
    for (int i = 1; i < kFewRows; ++i)
      if (few_rows && i == row) bias = biases[i];
#pragma unroll
    for (int j = 0; j < kFour; ++j) scores.values[j] += bias.values[j];
  }
  const int64_t to = (slot * tail.rows + row) * tail.width + column;
  *reinterpret_cast<Four<float>*>((stream ? tail.values[1] : tail.values[0]) + to) = values;
  *reinterpret_cast<Four<float>*>((stream ? tail.scores[1] : tail.scores[0]) + to) = scores;
}

static TokenRows token_rows(const dsv4_tensor& values, const dsv4_tensor& scores, const dsv4_tensor& ape,
                            int64_t columns) {
  TokenRows rows = {};
  rows.values = static_cast<const float*>(values.data);
  rows.scores = static_cast<const float*>(scores.data);
  rows.ape = static_cast<const float*>(ape.data);
  rows.values_stride = values.stride[0];
  rows.scores_stride = scores.stride[0];
  rows.columns = static_cast<int>(columns);
  return rows;
}

static void check_token_rows(Check& check, const char* name, const dsv4_tensor& rows, int64_t tokens, int64_t columns) {
  check.tensor(name, rows, one_of(DSV4_FLOAT32), {tokens, columns}, Layout::kStridedRows);
  check.aligned_rows(name, rows, kFour * sizeof(float));
}

static void check_ape(Check& check, const char* name, const dsv4_tensor& ape, int64_t m, int64_t columns) {
  check.optional_tensor(name, ape, one_of(DSV4_FLOAT32), {m, columns});
  check.aligned_rows(name, ape, kFour * sizeof(float));
}
}  // namespace dsv4

extern "C" dsv4_status dsv4_append(const dsv4_append_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("append");
  const dsv4_append_args args = check.read(given);
  const int64_t tokens = extent(args.kv, 0);
  const int64_t requests = extent(args.request_slots, 0);
  const int64_t slots = extent(args.tail_ka, 0);
  const int64_t rows = extent(args.tail_ka, 1);
  const int64_t width = extent(args.tail_ka, 2);
  const int64_t streams = present(args.next_kb) ? 2 : 1;
  const int64_t head_dim = extent(args.kv, 1) / streams;
  check_token_rows(check, "kv", args.kv, kAny, kAny);
  check.range("kv rows (tokens)", tokens, 0, INT32_MAX);
  check.multiple("kv columns (streams * head_dim)", extent(args.kv, 1), streams * kFour);
  check_token_rows(check, "z", args.z, tokens, streams * head_dim);
  check.tensor("request_slots", args.request_slots, one_of(DSV4_INT32), {kAny});
  check.range("request_slots (requests)", requests, 0, INT32_MAX - 1);
  check.tensor("positions", args.positions, one_of(DSV4_INT64), {requests});
  check_first_tail(check, "tail_ka", args.tail_ka);
  check.range("kv columns (streams * head_dim)", streams * head_dim, 0, saturating_product(streams, width));
  if (check.status()) return check.status();  // the code below computes with these extents
  const int64_t indexer_head_dim = width - head_dim;
  check_tail(check, "tail_za", args.tail_za, args.tail_ka);
  check.tensor("tail_len", args.tail_len, one_of(DSV4_INT32), {slots});
  check.tensor("slot_positions", args.slot_positions, one_of(DSV4_INT64), {slots});
  check_next_rows(check, args);
  if (present(args.token_offsets))
    check.tensor("token_offsets", args.token_offsets, one_of(DSV4_INT32), {requests + 1});
  const bool with_indexer = indexer_head_dim > 0;
  if (present(args.indexer_kv) || (with_indexer && !present(args.indexer_z)))
    check_token_rows(check, "indexer_kv", args.indexer_kv, tokens, streams * indexer_head_dim);
  if (present(args.indexer_z) || present(args.indexer_kv))
    check_token_rows(check, "indexer_z", args.indexer_z, tokens, streams * indexer_head_dim);
  if (present(args.indexer_z))
    check_token_rows(check, "indexer_kv", args.indexer_kv, tokens, streams * indexer_head_dim);
  check.range("m", args.m, 1, rows);
  check_ape(check, "ape", args.ape, args.m, streams * head_dim);
  check_ape(check, "indexer_ape", args.indexer_ape, args.m, streams * indexer_head_dim);
  check.range("round", args.round, 0, INT32_MAX);
  check.changes(args.tail_ka, args.tail_za, args.tail_len, args.slot_positions, args.next_kb, args.next_zb);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0 || requests == 0) return DSV4_OK;
  NewTokens tokens_given = {};
  tokens_given.entry = token_rows(args.kv, args.z, args.ape, head_dim);
  tokens_given.indexer = token_rows(args.indexer_kv, args.indexer_z, args.indexer_ape, indexer_head_dim);
  tokens_given.request_slots = static_cast<const int32_t*>(args.request_slots.data);
  tokens_given.positions = static_cast<const int64_t*>(args.positions.data);
  tokens_given.token_offsets = static_cast<const int32_t*>(args.token_offsets.data);
  tokens_given.tokens = tokens;
  tokens_given.requests = requests;
  const bool two = streams == 2;
  Tail tail = {};
  tail.values[0] = static_cast<float*>(two ? args.next_kb.data : args.tail_ka.data);
  tail.scores[0] = static_cast<float*>(two ? args.next_zb.data : args.tail_za.data);
  tail.values[1] = static_cast<float*>(args.tail_ka.data);
  tail.scores[1] = static_cast<float*>(args.tail_za.data);
  tail.length = static_cast<int32_t*>(args.tail_len.data);
  tail.positions = static_cast<int64_t*>(args.slot_positions.data);
  tail.slots = slots;
  tail.rows = static_cast<int>(rows);
  tail.width = static_cast<int>(width);
  tail.streams = static_cast<int>(streams);
  const dim3 grid(static_cast<uint32_t>(tokens), std::max(1u, blocks_for(streams * width, kThreads * kFour)));
  return launch<append_kernel>(target, {grid, kThreads}, tokens_given, tail, LongDivisor(args.m), args.round);
}
