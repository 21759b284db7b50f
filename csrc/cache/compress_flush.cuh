// Device code of compress_flush: the tokens of one call, and the state that holds the rows of earlier calls.
//
// A row is the kv and the score of one token. The rows that a block needs come from the call's own tokens where this
// call brought them and from the state otherwise, so nothing that the call stores is read again by it. One hazard
// remains: a new token may overwrite a state row that a pooled entry still has to read. Each half of such a row has
// exactly one reader thread (the entry of its block reads the second stream, the entry of the next block the first), so
// that thread stores the new row after it has read the old one, and the token's own block skips it.
// is_read_by_an_entry() decides.
#pragma once

#include <type_traits>

#include "cache/entry_codec.cuh"
#include "cache/pooled_rows.cuh"
#include "device/divide.cuh"
#include "device/indices.cuh"

namespace dsv4 {

struct CompressFlush {
  const void* kv;
  const void* score;
  const float* ape;
  Indices query_starts;
  Indices start_positions;
  const int32_t* state_table;
  float* state;
  const void* norm_weight;
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
  Divisor tokens_per_request;  // if all requests bring the same number; otherwise a first guess
  Divisor state_rows;
  Divisor state_columns;
  Divisor capacity;  // positions until a state row is reused (rows * columns)
  int32_t tokens;
  int32_t requests;
  int32_t tokens_per_task;  // tokens of one thread block or cluster
  int32_t head_dim;
  int32_t width;
  int32_t head_bits;   // head_dim is kChannels << head_bits
  int32_t ratio_bits;  // ratio is 1 << ratio_bits
  int32_t blocks_per_request;
  float epsilon;
  float reciprocal_dim;  // 1 / head_dim
  bool norm_is_bfloat16;
  bool overlap;
  bool hadamard;
  bool round_once;

  __host__ __device__ int ratio() const { return 1 << ratio_bits; }
  __host__ __device__ int window() const { return ratio() << (overlap ? 1 : 0); }
};

struct Request {
  int32_t index;  // -1 for tokens of no request
  int32_t first;  // tokens [first, end) of the call
  int32_t end;
  int32_t start;  // position of the first one
  int32_t page;   // state page, if state_table has one column

  __device__ bool holds(int token) const { return token >= first && token < end; }
  __device__ uint32_t position(int token) const { return static_cast<uint32_t>(start + (token - first)); }
  __device__ uint32_t end_position() const { return position(end); }
};

constexpr int64_t kMaxPosition = INT32_MAX;

// All loads depend on the index alone, so they are in flight together.
__device__ inline Request load_request(const CompressFlush& call, int index) {
  const int first = call.query_starts.saturated(index), end = call.query_starts.saturated(index + 1);
  const int64_t start = call.start_positions[index];
  const int page = call.state_table[static_cast<int64_t>(index) * call.state_columns.value];
  Request request = {index, first, min(end, call.tokens), static_cast<int32_t>(start), page};
  const bool valid = first >= 0 && start >= 0 && start + call.tokens <= kMaxPosition;
  if (!valid) request.end = first;
  return request;
}

// The request of a token. Every lane of the warp must call it, for the same token.
__device__ inline Request find_request(const CompressFlush& call, int token) {
  // The guess is right if all requests bring the same number of tokens; then the dependent chain is one load.
  int index = min(static_cast<int>(call.tokens_per_request.quotient(token)), call.requests - 1);
#pragma unroll 1
  for (bool searched = false; index < call.requests; searched = true) {
    const Request found = load_request(call, index);
    if (found.holds(token)) return found;
    if (searched) break;
    index = 0;  // requests that end at or before the token
#pragma unroll 1
    for (int i = threadIdx.x % kWarpLanes; i < call.requests; i += kWarpLanes)
      index += call.query_starts[i + 1] <= token;
    index = __reduce_add_sync(kFullWarp, index);
  }
  return {-1, token, token + 1, 0, -1};
}

// The kv of a row in the state; its score follows `width` elements later. Null if state_table has no valid page.
__device__ inline float* state_row(const CompressFlush& call, const Request& request, uint32_t position) {
  const uint32_t turn = call.state_rows.quotient(position);
  const uint32_t row = position - turn * call.state_rows.value;
  int page = request.page;
  if (call.state_columns.value > 1) {
    const uint32_t column = turn - call.state_columns.quotient(turn) * call.state_columns.value;
    page = call.state_table[static_cast<int64_t>(request.index) * call.state_columns.value + column];
  }
  if (page < 0 || page >= call.state_pages) return nullptr;
  return call.state + (static_cast<int64_t>(page) * call.state_rows.value + row) * 2 * call.width;
}

// Whether an entry that completes in this call reads one half of the row at an earlier position. With two streams the
// first half belongs to the entry of the next block; without, there is only one half, which counts as the second.
__device__ inline bool is_read_by_an_entry(const CompressFlush& call, const Request& request, uint32_t position,
                                           bool first_half) {
  const uint32_t next_block = (position >> call.ratio_bits) + (first_half ? 2 : 1);
  const uint32_t completed_by = (next_block << call.ratio_bits) - 1;
  return completed_by >= static_cast<uint32_t>(request.start) && completed_by < request.end_position();
}

// Four channels of a row as stored; upcast() converts them to float32. A thread issues all its loads before it converts
// any, so that it waits once.
template <typename T>
__device__ inline void load_raw(const T* row, Four<float>* raw) {
  if constexpr (sizeof(T) == sizeof(float)) {
    reinterpret_cast<float4&>(*raw) = __ldg(reinterpret_cast<const float4*>(row));
  } else {
    reinterpret_cast<uint2&>(*raw) = __ldg(reinterpret_cast<const uint2*>(row));
  }
}

template <typename T>
__device__ inline void upcast(Four<float>* raw) {
  if constexpr (sizeof(T) != sizeof(float)) {
    const float2 low = unpack_bfloat16(__float_as_uint(raw->values[0]));
    const float2 high = unpack_bfloat16(__float_as_uint(raw->values[1]));
    *raw = {{low.x, low.y, high.x, high.y}};
  }
}

// Four channels of a token: kv, score, and the position's bias, which upcast() adds to the score.
struct TokenChannels {
  Four<float> kv;
  Four<float> score;
  Four<float> bias;
};

template <typename T>
__device__ inline void load_token(const CompressFlush& call, int token, uint32_t position, int column,
                                  TokenChannels* channels) {
  channels->score = channels->bias = {};
  load_raw(static_cast<const T*>(call.kv) + token * call.kv_stride + column, &channels->kv);
  if (call.score) load_raw(static_cast<const T*>(call.score) + token * call.score_stride + column, &channels->score);
  if (call.ape) {
    const uint32_t row = position & (call.ratio() - 1);
    load_raw(call.ape + static_cast<int64_t>(row) * call.width + column, &channels->bias);
  }
}

template <typename T>
__device__ inline void upcast(TokenChannels* channels) {
  upcast<T>(&channels->kv);
  upcast<T>(&channels->score);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) channels->score.values[i] += channels->bias.values[i];
}

__device__ inline Four<float> load_channels(const float* row) { return *reinterpret_cast<const Four<float>*>(row); }

__device__ inline void store_channels(float* row, const Four<float>& channels) {
  *reinterpret_cast<Four<float>*>(row) = channels;
}

// Stores the rows of tokens [first, end) to the state. Skips a token whose state row a later token of the call
// overwrites, and one whose state row holds an old row that an entry reads: that entry's thread stores it
// (store_successors). Executed by `threads` threads, of which this is number `thread`.
template <typename T>
__device__ inline void store_tokens(const CompressFlush& call, const Request& request, int first, int end, int thread,
                                    int threads) {
  const int64_t kept = request.end - int64_t{call.capacity.value};
  if (kept > first) first = kept < end ? static_cast<int>(kept) : end;
  const int count = (end - first) << call.head_bits;
#pragma unroll 1
  for (int i = thread; i < count; i += threads) {
    const int token = first + (i >> call.head_bits);
    const int column = kChannels * (i & ((1 << call.head_bits) - 1));
    const uint32_t position = request.position(token);
    float* const row = state_row(call, request, position);
    if (!row) continue;
    const int64_t turns = call.capacity.quotient(token - request.first) + 1;
    const int64_t replaced = position - turns * call.capacity.value;
    bool stored[2] = {true, call.overlap};  // of the halves of a row with two streams, or of the whole row
    if (replaced >= 0) {
      stored[0] = !is_read_by_an_entry(call, request, replaced, call.overlap);
      stored[1] = call.overlap && !is_read_by_an_entry(call, request, replaced, false);
    }
    TokenChannels channels[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (stored[half]) load_token<T>(call, token, position, column + half * call.head_dim, &channels[half]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!stored[half]) continue;
      upcast<T>(&channels[half]);
      store_channels(row + column + half * call.head_dim, channels[half].kv);
      store_channels(row + column + half * call.head_dim + call.width, channels[half].score);
    }
  }
}

// Loads what decides where a block's entry goes: a page of block_table or an element of slot_mapping. destination()
// computes the place from it later, so that the load's latency is hidden.
__device__ inline int64_t load_destination(const CompressFlush& call, const Request& request, int token, int block) {
  if (!call.block_table) return call.slot_mapping[token];
  const int column = call.pages.entries.quotient(block);
  if (column >= call.blocks_per_request) return -1;
  return call.block_table[request.index * int64_t{call.blocks_per_request} + column];
}

__device__ inline Place destination(const CompressFlush& call, int64_t loaded, int block) {
  if (!call.block_table) return call.pages.place(loaded);
  const int column = call.pages.entries.quotient(block);
  return {loaded < call.pages.count ? loaded : -1, block - column * static_cast<int>(call.pages.entries.value)};
}

// Where a row of a block's window is. One thread computes it for its warp or block, as the address computation takes
// much longer than the load itself.
struct alignas(16) RowPlace {
  enum Flags : int32_t {
    kExists = 1,    // clear: before position 0, beyond the window, or missing
    kFromCall = 2,  // clear: from the state
    kHasScore = 4,
    kHasBias = 8,
    kMissing = 16,  // its state page is out of range
  };

  const void* kv;  // the entry's first channel
  const void* score;
  int32_t flags;
  int32_t bias;  // an element of ape

  __device__ bool is(int set) const { return (flags & set) == set; }
  __device__ bool in_state() const { return (flags & (kExists | kFromCall)) == kExists; }
};

// Computes both addresses and selects one: a divergent branch would execute both sides one after the other.
template <typename T>
__device__ inline RowPlace find_row(const CompressFlush& call, const Request& request, int block, int row) {
  const int position = ((block + 1) << call.ratio_bits) - call.window() + row;
  const int column = call.overlap && row >= call.ratio() ? call.head_dim : 0;
  const bool within = row < call.window() && position >= 0;
  const bool from_call = position >= request.start;
  const float* const state = state_row(call, request, max(position, 0));
  const int64_t token = request.first + (position - request.start);
  const int state_flags = state ? RowPlace::kExists | RowPlace::kHasScore : RowPlace::kMissing;
  const int call_flags = RowPlace::kExists | RowPlace::kFromCall | (call.score ? RowPlace::kHasScore : 0) |
                         (call.ape ? RowPlace::kHasBias : 0);
  RowPlace place;
  place.kv = from_call ? static_cast<const void*>(static_cast<const T*>(call.kv) + token * call.kv_stride + column)
                       : state + column;
  place.score = from_call
                    ? static_cast<const void*>(static_cast<const T*>(call.score) + token * call.score_stride + column)
                    : state + column + call.width;
  place.flags = !within ? 0 : from_call ? call_flags : state_flags;
  place.bias = (position & (call.ratio() - 1)) * call.width + column;
  return place;
}

// Rows `row`, `row + step`, ... of a window, four channels of each. What does not exist has score -infinity.
template <int Count>
struct Rows {
  Four<float> kv[Count];
  Four<float> score[Count];
};

template <typename T, int Count>
__device__ inline Rows<Count> load_rows(const CompressFlush& call, const RowPlace* places, int row, int step,
                                        int channel) {
  // All places are read before the first row is loaded: a later shared-memory read would wait for loads in flight.
  RowPlace found[Count];
  if (Count > 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) found[i] = places[row + i * step];
    __syncwarp();  // the compiler may not reorder across it
  }
  TokenChannels loaded[Count];
  bool from_call[Count];
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const RowPlace place = Count > 2 ? found[i] : places[row + i * step];
    __builtin_assume(__isGlobal(place.kv) && __isGlobal(place.score));
    from_call[i] = place.is(RowPlace::kFromCall);
    const bool exists = place.is(RowPlace::kExists), has_score = place.is(RowPlace::kExists | RowPlace::kHasScore);
    loaded[i].kv = loaded[i].bias = {};
    loaded[i].score = exists ? Four<float>{} : masked_scores();
    if (std::is_same_v<T, float> || !from_call[i]) {
      if (exists) loaded[i].kv = load_channels(static_cast<const float*>(place.kv) + channel);
      if (has_score) loaded[i].score = load_channels(static_cast<const float*>(place.score) + channel);
    } else {
      if (exists) load_raw(static_cast<const T*>(place.kv) + channel, &loaded[i].kv);
      if (has_score) load_raw(static_cast<const T*>(place.score) + channel, &loaded[i].score);
    }
    if (place.is(RowPlace::kExists | RowPlace::kHasBias)) load_raw(call.ape + place.bias + channel, &loaded[i].bias);
  }
  Rows<Count> rows;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if (from_call[i]) upcast<T>(&loaded[i]);
    rows.kv[i] = loaded[i].kv;
    rows.score[i] = loaded[i].score;
  }
  return rows;
}

// For calls with more tokens than the state has rows: stores the tokens that overwrite the rows which this thread has
// loaded with load_rows() of the same arguments.
template <typename T>
__device__ inline void store_successors(const CompressFlush& call, const Request& request, int block,
                                        const RowPlace* places, int row, int step, int channel) {
  const int window = call.window();
  const int window_start = ((block + 1) << call.ratio_bits) - window;
  const uint32_t capacity = call.capacity.value;
  if (window_start + int64_t{capacity} >= request.end_position()) return;
#pragma unroll 1
  for (; row < window; row += step) {
    if (!places[row].in_state()) continue;
    const uint32_t position = window_start + row;
    const uint32_t turns = call.capacity.quotient(request.end_position() - 1 - position);
    if (turns == 0) continue;
    const uint32_t successor = position + turns * capacity;
    const int column = channel + (call.overlap && row >= call.ratio() ? call.head_dim : 0);
    TokenChannels channels;
    load_token<T>(call, request.first + static_cast<int>(successor - request.start), successor, column, &channels);
    upcast<T>(&channels);
    float* const place = state_row(call, request, successor);
    store_channels(place + column, channels.kv);
    store_channels(place + call.width + column, channels.score);
  }
}

// The sum over one warp, or over the first four of the block, which have 512 channels. `scratch` is read until the next
// barrier.
__device__ inline float sum_over_entry(float value, float* scratch, bool four_warps) {
  value = sum_over_group(value, kWarpLanes);
  if (!four_warps) return value;
  if (threadIdx.x % kWarpLanes == 0) scratch[threadIdx.x / kWarpLanes] = value;
  await_four_warps();
  const float4 sums = *reinterpret_cast<const float4*>(scratch);
  return sums.x + sums.y + sums.z + sums.w;
}

// Four channels' share of the normalisation's weight, as stored, and, for the last 64 channels, of the rotation.
struct Finish {
  Four<float> weight;
  float2 cosine;
  float2 sine;
};

constexpr int kRopeDim = 64;

__device__ inline Finish load_finish(const CompressFlush& call, int block, int channel) {
  Finish finish = {};
  if (call.norm_is_bfloat16)
    load_raw(static_cast<const __nv_bfloat16*>(call.norm_weight) + channel, &finish.weight);
  else
    load_raw(static_cast<const float*>(call.norm_weight) + channel, &finish.weight);
  const int rotated = channel - (call.head_dim - kRopeDim);
  const int64_t position = static_cast<int64_t>(block) << call.ratio_bits;
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
// first head_dim / 4 threads of the block, one or four warps. `scratch`: kScratch floats.
constexpr int kScratch = 8;  // a sum and a maximum of four warps

__device__ inline void finish_entry(const CompressFlush& call, const Place& place, const Finish& finish, int channel,
                                    float (&v)[kChannels], float* scratch) {
  const bool rounds = !call.round_once;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (rounds) v[i] = round_to_bfloat16(v[i]);
    squares = fmaf(v[i], v[i], squares);
  }
  const float mean = sum_over_entry(squares, scratch, call.head_dim > kChannels * kWarpLanes) * call.reciprocal_dim;
  const float scale = rsqrtf(mean + call.epsilon);
  Four<float> weight = finish.weight;
  if (call.norm_is_bfloat16) upcast<__nv_bfloat16>(&weight);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    v[i] = v[i] * scale * weight.values[i];
    if (rounds) v[i] = round_to_bfloat16(v[i]);
  }
  if (channel >= call.head_dim - kRopeDim) {
    const float cosines[] = {finish.cosine.x, finish.cosine.y}, sines[] = {finish.sine.x, finish.sine.y};
#pragma unroll
    for (int pair = 0; pair < kChannels / 2; ++pair) {
      // Each product is rounded (no fused multiply-add), for the same bits as engines that compute in float32 without
      // it.
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
  store_entry(call.layout, call.quantization, call.pages, place, channel, v, scratch + kScratch / 2);
}

}  // namespace dsv4
