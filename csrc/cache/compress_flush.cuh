// What one call of compress_flush brings: tokens of requests, and the state that holds the rows of earlier calls.
//
// A row is the kv and the score of one token. The rows that a block needs come from the call's own tokens where this
// call brought them and from the state otherwise, so nothing that the call stores is read again by it. What remains is
// that a token may be stored to a place that an entry still reads. Every such place is read by one thread only: an
// entry is the only one that reads its block's second stream, and the one after it the only one that reads the first.
// So that thread stores the new row there once it has read the old one, and the token's own block leaves it alone;
// is_read_by_an_entry() is the rule that both go by.
#pragma once

#include "cache/entry_codec.cuh"
#include "cache/pooled_rows.cuh"
#include "device/indices.cuh"

namespace dsv4 {

constexpr int kRows = 8;  // that a thread has in flight at once

struct CompressFlush {
  const void* kv;
  const void* score;
  const float* ape;
  const int32_t* query_starts;
  Indices start_positions;
  const int32_t* state_table;
  float* state;
  const float* norm_weight;
  const float* cos_sin;
  const int32_t* block_table;
  Indices slot_mapping;
  Pages pages;
  int64_t kv_stride;
  int64_t score_stride;
  int64_t state_pages;
  int64_t positions;  // rows of cos_sin
  PageLayout layout;
  Quantization quantization;
  int32_t tokens;
  int32_t requests;
  int32_t tokens_a_request;  // where all requests bring the same number; a first guess otherwise
  int32_t tokens_a_task;
  int32_t head_dim;
  int32_t width;
  int32_t ratio;
  int32_t state_rows;
  int32_t state_columns;
  int32_t capacity;  // positions until a place in the state comes again
  int32_t blocks_a_request;
  float epsilon;
  bool overlap;
  bool hadamard;
  bool round_once;

  __host__ __device__ int window() const { return overlap ? 2 * ratio : ratio; }
};

struct Request {
  int32_t index;  // -1 for tokens of no request
  int32_t first;  // tokens [first, end) of the call
  int32_t end;
  int32_t start;  // position of the first one
  int32_t page;   // of the state, where a request has only one

  __device__ bool holds(int token) const { return token >= first && token < end; }
  __device__ int64_t position(int token) const { return int64_t{start} + token - first; }
  __device__ int64_t end_position() const { return position(end); }
};

constexpr int64_t kMaxPosition = INT32_MAX;

// All its loads at once: they depend on nothing but the index.
__device__ inline Request load_request(const CompressFlush& call, int index) {
  const int first = call.query_starts[index], end = call.query_starts[index + 1];
  const int64_t start = call.start_positions[index];
  const int page = call.state_table[static_cast<int64_t>(index) * call.state_columns];
  Request request = {index, first, min(end, call.tokens), static_cast<int32_t>(start), page};
  const bool valid = first >= 0 && start >= 0 && start + call.tokens <= kMaxPosition;
  if (!valid) request.end = first;
  return request;
}

// The request of a token. Every lane of the warp must call it, for the same token.
__device__ inline Request find_request(const CompressFlush& call, int token) {
  // Right where all requests bring the same number of tokens, and then the only chain is one load long.
  const Request guess = load_request(call, min(token / call.tokens_a_request, call.requests - 1));
  if (guess.holds(token)) return guess;
  int passed = 0;  // requests that end at or before the token
  for (int i = threadIdx.x % kWarpLanes; i < call.requests; i += kWarpLanes)
    passed += call.query_starts[i + 1] <= token;
  passed = __reduce_add_sync(kFullWarp, passed);
  if (passed < call.requests) {
    const Request found = load_request(call, passed);
    if (found.holds(token)) return found;
  }
  return {-1, token, token + 1, 0, -1};
}

// The kv of a row in the state; its score follows `width` later. Null where the table names no page.
__device__ inline float* state_row(const CompressFlush& call, const Request& request, int64_t position) {
  const uint32_t at = static_cast<uint32_t>(position);
  const uint32_t column = at / call.state_rows % call.state_columns;
  const int page = call.state_columns == 1
                       ? request.page
                       : call.state_table[static_cast<int64_t>(request.index) * call.state_columns + column];
  if (page < 0 || page >= call.state_pages) return nullptr;
  return call.state + (static_cast<int64_t>(page) * call.state_rows + at % call.state_rows) * 2 * call.width;
}

// Whether an entry that completes in this call reads one half of the row at an earlier position. With two streams the
// first half belongs to the entry of the next block; without, there is only one half, which counts as the second.
__device__ inline bool is_read_by_an_entry(const CompressFlush& call, const Request& request, int64_t position,
                                           bool first_half) {
  const int64_t block = position / call.ratio + (first_half ? 1 : 0);
  const int64_t completed_by = (block + 1) * call.ratio - 1;
  return completed_by >= request.start && completed_by < request.end_position();
}

template <typename T>
__device__ inline Four<float> load_channels(const T* row) {
  const Four<T> loaded = *reinterpret_cast<const Four<T>*>(row);
  Four<float> channels;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) channels.values[i] = static_cast<float>(loaded.values[i]);
  return channels;
}

__device__ inline void store_channels(float* row, const Four<float>& channels) {
  *reinterpret_cast<Four<float>*>(row) = channels;
}

// Four channels of a token, with the position's bias added to the score.
template <typename T>
__device__ inline void load_token(const CompressFlush& call, int token, int64_t position, int column, Four<float>* kv,
                                  Four<float>* score) {
  *kv = load_channels(static_cast<const T*>(call.kv) + token * call.kv_stride + column);
  *score = {};
  if (call.score) *score = load_channels(static_cast<const T*>(call.score) + token * call.score_stride + column);
  if (call.ape) {
    const uint32_t row = static_cast<uint32_t>(position) % call.ratio;
    const Four<float> bias = load_channels(call.ape + static_cast<int64_t>(row) * call.width + column);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) score->values[i] += bias.values[i];
  }
}

// Stores the row of a token to the state, unless a later token of the call takes the same place, or a thread that reads
// the place's old row will do it. By threads `thread` of `threads`, which all call it.
template <typename T>
__device__ inline void store_token(const CompressFlush& call, const Request& request, int token, int thread,
                                   int threads) {
  const int64_t position = request.position(token), capacity = call.capacity;
  if (position + capacity < request.end_position()) return;
  float* const row = state_row(call, request, position);
  if (!row) return;
  const int64_t replaced = position - ((position - request.start) / capacity + 1) * capacity;
  const bool keep_first = call.overlap && replaced >= 0 && is_read_by_an_entry(call, request, replaced, true);
  const bool keep_second = replaced >= 0 && is_read_by_an_entry(call, request, replaced, false);
  for (int column = kChannels * thread; column < call.width; column += kChannels * threads) {
    if (call.overlap && column < call.head_dim ? keep_first : keep_second) continue;
    Four<float> kv, score;
    load_token<T>(call, token, position, column, &kv, &score);
    store_channels(row + column, kv);
    store_channels(row + call.width + column, score);
  }
}

// Where the entry of a block goes: its index among the entries of all pages, or -1.
__device__ inline int64_t destination(const CompressFlush& call, const Request& request, int token, int block) {
  if (!call.block_table) return call.slot_mapping[token];
  const int column = block / call.pages.entries;
  if (column >= call.blocks_a_request) return -1;
  const int64_t page = call.block_table[request.index * int64_t{call.blocks_a_request} + column];
  return page < 0 ? -1 : page * call.pages.entries + block % call.pages.entries;
}

// Some rows of a block's window, four channels of each: `first`, `first + step`, ... Rows that do not exist, before
// position 0 and beyond the window, have score -infinity.
struct Rows {
  Four<float> kv[kRows];
  Four<float> score[kRows];
  uint32_t from_state;  // a bit for each that came from there
  bool complete;        // whether the state had all that were wanted of it
  int window_start;     // position of the window's first row
  int first, step, channel;
};

__device__ inline int column_of(const CompressFlush& call, const Rows& rows, int i) {
  return rows.channel + (call.overlap && rows.first + i * rows.step >= call.ratio ? call.head_dim : 0);
}

template <typename T>
__device__ inline Rows load_rows(const CompressFlush& call, const Request& request, int block, int first, int step,
                                 int channel) {
  const int window = call.window();
  Rows rows;
  rows.from_state = 0;
  rows.complete = true;
  rows.window_start = (block + 1) * call.ratio - window;
  rows.first = first, rows.step = step, rows.channel = channel;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * step;
    const int position = rows.window_start + row;
    const int column = column_of(call, rows, i);
    rows.kv[i] = {};
    rows.score[i] = masked_scores();
    if (row >= window || position < 0) continue;
    if (position >= request.start) {
      load_token<T>(call, request.first + (position - request.start), position, column, &rows.kv[i], &rows.score[i]);
    } else if (float* const place = state_row(call, request, position)) {
      rows.kv[i] = load_channels(place + column);
      rows.score[i] = load_channels(place + call.width + column);
      rows.from_state |= 1u << i;
    } else {
      rows.complete = false;
    }
  }
  return rows;
}

// In a call that is longer than the state has room for: stores the tokens that take the place of rows read before.
template <typename T>
__device__ inline void store_successors(const CompressFlush& call, const Request& request, const Rows& rows) {
  const int64_t capacity = call.capacity;
  if (rows.window_start + capacity >= request.end_position()) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t position = rows.window_start + rows.first + i * rows.step;
    const int64_t turns = (request.end_position() - 1 - position) / capacity;
    if (!(rows.from_state >> i & 1) || turns == 0) continue;
    const int64_t successor = position + turns * capacity;
    const int column = column_of(call, rows, i);
    Four<float> kv, score;
    load_token<T>(call, request.first + static_cast<int>(successor - request.start), successor, column, &kv, &score);
    float* const place = state_row(call, request, successor);
    store_channels(place + column, kv);
    store_channels(place + call.width + column, score);
  }
}

// The sum over the first `warps` warps of the block. Their sums stay in `scratch` until the next barrier.
__device__ inline float sum_over_block(float value, float* scratch, int warps) {
  value = sum_over_group(value, kWarpLanes);
  if (warps == 1) return value;
  const int warp = threadIdx.x / kWarpLanes;
  if (warp < warps && threadIdx.x % kWarpLanes == 0) scratch[warp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < warps; ++i) sum += scratch[i];
  return sum;
}

// Four channels' share of the normalisation's weight and, for the last 64 channels, of the rotation.
struct Finish {
  Four<float> weight;
  float2 cosine;
  float2 sine;
};

constexpr int kRopeDim = 64;

__device__ inline Finish load_finish(const CompressFlush& call, int block, int channel) {
  Finish finish = {};
  if (channel >= call.head_dim) return finish;  // a thread that has no part in it
  finish.weight = load_channels(call.norm_weight + channel);
  const int rotated = channel - (call.head_dim - kRopeDim);
  const int64_t position = static_cast<int64_t>(block) * call.ratio;
  if (rotated >= 0 && position < call.positions) {
    const float* const row = call.cos_sin + position * kRopeDim + rotated / 2;
    finish.cosine = *reinterpret_cast<const float2*>(row);
    finish.sine = *reinterpret_cast<const float2*>(row + kRopeDim / 2);
  }
  return finish;
}

// 128 channels over the lanes of one warp; a butterfly for each bit of the channel, the lowest first.
__device__ inline void hadamard_128(float (&v)[kChannels]) {
  float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
  v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, v[i], distance);
      v[i] = upper ? other - v[i] : v[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) v[i] *= 0x1.6a09e6p-4f;  // 128^-1/2
}

// From the compressed channels of a block to its place in the pages: norm, rotation, Hadamard, quantisation. By the
// first head_dim / 4 threads of the block; the others call it too, for the barrier. `index` is -1 for an entry that is
// not to be written.
__device__ inline void finish_entry(const CompressFlush& call, int64_t index, const Finish& finish, int channel,
                                    float (&v)[kChannels], float* scratch) {
  const bool rounds = !call.round_once;
  const int warps = call.head_dim / kChannels / kWarpLanes;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (rounds) v[i] = round_to_bfloat16(v[i]);
    squares = fmaf(v[i], v[i], squares);
  }
  const float mean = sum_over_block(squares, scratch, warps) / call.head_dim;
  if (channel >= call.head_dim) return;
  const float scale = 1.0f / sqrtf(mean + call.epsilon);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    v[i] = v[i] * scale * finish.weight.values[i];
    if (rounds) v[i] = round_to_bfloat16(v[i]);
  }
  if (channel >= call.head_dim - kRopeDim) {
    const float cosines[] = {finish.cosine.x, finish.cosine.y}, sines[] = {finish.sine.x, finish.sine.y};
#pragma unroll
    for (int pair = 0; pair < kChannels / 2; ++pair) {
      // Each product rounded, so that the bits are those of any engine that computes in float32 without fused steps.
      const float even = v[2 * pair], odd = v[2 * pair + 1];
      v[2 * pair] = __fsub_rn(__fmul_rn(even, cosines[pair]), __fmul_rn(odd, sines[pair]));
      v[2 * pair + 1] = __fadd_rn(__fmul_rn(odd, cosines[pair]), __fmul_rn(even, sines[pair]));
    }
  }
  if (call.hadamard) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (rounds) v[i] = round_to_bfloat16(v[i]);
    hadamard_128(v);
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) v[i] = round_to_bfloat16(v[i]);
  store_entry(call.layout, call.quantization, call.pages, index, channel, v, index >= 0);
}

}  // namespace dsv4
