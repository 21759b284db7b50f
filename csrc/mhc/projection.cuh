// The first kernel of a seam: the update, and partial sums of the projection.
//
// The product: a lane's 8 columns of a token are, as they lie in memory, the second operand of two tensor core
// products. Of fn, it has the same columns of three rows and splits each value in three bfloat16 terms: the upper 8
// bits of its significand, the next 8, the rest. So the products are those of float32; the sums are the tensor cores'.
#pragma once

#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "mhc/seam.cuh"

namespace dsv4 {

constexpr int kTerms = 3;
constexpr int kMostLinesOfThread = 3;  // of fn, 128 bytes each, that a thread prefetches

// Four neighbouring values of a row of fn as three rows of bfloat16 pairs, whose sum they are.
struct SplitValues {
  uint32_t term[kTerms][2];
};

__device__ inline SplitValues split(const float4& values) {
  SplitValues result;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float low = i ? values.z : values.x, high = i ? values.w : values.y;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      const uint32_t low_bits = __float_as_uint(low), high_bits = __float_as_uint(high);
      result.term[t][i] = __byte_perm(low_bits, high_bits, 0x7632);
      low -= __uint_as_float(low_bits & 0xffff0000u);
      high -= __uint_as_float(high_bits & 0xffff0000u);
    }
  }
  return result;
}

// The first operands of a unit, in shared memory in the order in which lanes need them: per step, which is 16 columns
// of a stream, those of 16 rows (three terms), and those of the last eight rows, or of the head's four: the first term
// above the second, then the third.
template <Form kForm>
struct UnitRows {
  static constexpr int kSteps = 2 * kStreams;
  static constexpr bool kSixteen = kForm != Form::kHead;
  static constexpr int kLaneRows = kSixteen ? 3 : 1;  // lane / 4, + 8, + 16

  struct Step {
    uint4 sixteen[kSixteen ? kTerms : 0 + 1][kWarpLanes];
    uint4 last[kWarpLanes];
    uint2 last_third[kWarpLanes];
  };
  Step step[kSteps];

  // Reads a step's columns of fn; `column` is the lane's first of 8 in a stream.
  __device__ void load(int number, const float* fn, int hidden, int column, int lane) {
    const float* const from = fn + static_cast<int64_t>(number / 2) * hidden + column + number % 2 * kChunk / 2;
    SplitValues rows[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = lane / 4 + 8 * i;
      float4 values = {};
      if (column < hidden && row < kRowsOf<kForm>)
        values = __ldg(reinterpret_cast<const float4*>(from + row * (int64_t{kStreams} * hidden)));
      rows[i] = split(values);
    }
    Step& place = step[number];
    if constexpr (kSixteen) {
#pragma unroll
      for (int t = 0; t < kTerms; ++t)
        place.sixteen[t][lane] = {rows[0].term[t][0], rows[1].term[t][0], rows[0].term[t][1], rows[1].term[t][1]};
    }
    const SplitValues& last = rows[kLaneRows - 1];
    place.last[lane] = {last.term[0][0], last.term[1][0], last.term[0][1], last.term[1][1]};
    place.last_third[lane] = {last.term[2][0], last.term[2][1]};
  }
};

// The sums of a group of 8 tokens over the columns of one stream: with row = lane / 4 and q = lane % 4, those of rows
// `row`, + 8 and + 16 with tokens 2q and 2q + 1.
template <Form kForm>
struct StreamSums {
  float of_sixteen[4] = {}, of_last[4] = {};

  __device__ float value(int i, int odd) const {
    if (kForm != Form::kHead && i < 2) return of_sixteen[2 * i + odd];
    return of_last[odd] + of_last[2 + odd];
  }
};

__device__ inline float add_squares(const uint2& pairs, float sum) {
  sum = fmaf(low_half(pairs.x), low_half(pairs.x), sum);
  sum = fmaf(high_half(pairs.x), high_half(pairs.x), sum);
  sum = fmaf(low_half(pairs.y), low_half(pairs.y), sum);
  return fmaf(high_half(pairs.y), high_half(pairs.y), sum);
}

// What a warp has of a group of tokens in shared memory: a lane has 8 columns of token lane / 4.
template <bool kUpdates>
struct GroupChunks {
  uint4 of[kStreams + (kUpdates ? 1 : 0)][kWarpLanes];
};

// Shared memory of a block, one part behind the other.
template <Form kForm, int kGroups>
struct ProjectionMemory {
  static constexpr int kPitch = kForm == Form::kHead ? 12 : 28;  // floats per token that avoid bank conflicts
  using Group = GroupChunks<kUpdates<kForm>>;

  UnitRows<kForm>* rows;  // [slice_units]
  Group* chunks;          // [sets][slice_units][kGroups]
  float* sums;            // [sets][slice_units][kGroups * kGroupTokens][kPitch]; not of a slice of one unit

  __device__ ProjectionMemory(void* memory, int slice_units, int sets)
      : rows(static_cast<UnitRows<kForm>*>(memory)),
        chunks(reinterpret_cast<Group*>(rows + slice_units)),
        sums(reinterpret_cast<float*>(chunks + sets * slice_units * kGroups)) {}

  static constexpr SeamMemory kSizes = {sizeof(UnitRows<kForm>), sizeof(Group), sizeof(float) * kPitch * kGroupTokens};
};

// Blocks [slices, ranges]: a block has a slice of the columns, all of fn that belongs to it, and a range of the tokens
// from `first_token` to `end_token`. Each of its warps has one unit of the slice; several sets of warps take kGroups
// groups of tokens by turns. Writes a row of partial sums per token and slice.
template <Form kForm, int kGroups>
__global__ void __launch_bounds__(kMostProjectionThreads, 1)
    hyper_connection_project_kernel(const __grid_constant__ Seam seam, uint32_t first_token, uint32_t end_token,
                                    uint32_t range_tokens, int sets) {
  constexpr int kRows = kRowsOf<kForm>, kRow = kRowFloats<kForm>;
  constexpr int kLaneRows = UnitRows<kForm>::kLaneRows;
  constexpr uint32_t kPassTokens = kGroups * kGroupTokens;
  using Memory = ProjectionMemory<kForm, kGroups>;
  extern __shared__ uint4 dynamic[];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int slice = blockIdx.x, slice_units = seam.slice_units;
  const int set = warp / slice_units, unit = warp % slice_units;
  const Memory memory(dynamic, slice_units, sets);
  auto* const chunks = memory.chunks + warp * kGroups;
  const int column = (slice * slice_units + unit) * kUnitColumns + lane % 4 * kChunk;
  const bool has_columns = column < seam.hidden;
  const uint32_t first = first_token + blockIdx.y * range_tokens;
  const uint32_t end = min(end_token, first + range_tokens);
  const auto synchronize_set = [&] {
    asm volatile("bar.sync %0, %1;" ::"r"(set + 1), "r"(slice_units * kWarpLanes) : "memory");
  };

  // fn is on its way into L2 while the previous kernel runs: 128 bytes of each stream, row and unit.
  constexpr int kLines = kRows * kStreams;
#pragma unroll
  for (int i = 0; i < kMostLinesOfThread; ++i) {
    const int index = static_cast<int>(threadIdx.x + i * blockDim.x);
    const int first_column = (slice * slice_units + index / kLines) * kUnitColumns;
    const float* const line = seam.fn + static_cast<int64_t>(index % kLines) * seam.hidden + first_column;
    prefetch_into_l2(line, (index < slice_units * kLines) & (first_column < seam.hidden));
  }
  await_previous_grid();

  const auto load = [&](uint32_t pass) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t token = pass + g * kGroupTokens + lane / 4;
      const bool exists = token < end && has_columns;
      const __nv_bfloat16* from = seam.streams.data + token * seam.streams.token_stride + column;
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        if (exists)
          copy_async(&chunks[g].of[j][lane], from);
        else
          chunks[g].of[j][lane] = {};
        from += seam.streams.stream_stride;
      }
      if constexpr (kUpdates<kForm>)
        if (exists) copy_async(&chunks[g].of[kStreams][lane], seam.update.chunk_of_x(token, column));
      commit_copies();
    }
  };
  uint32_t pass = first + set * kPassTokens;
  load(pass);
  for (int step = set; step < UnitRows<kForm>::kSteps; step += sets)
    memory.rows[unit].load(step, seam.fn, seam.hidden, column, lane);
  __syncthreads();

  for (; pass < end; pass += sets * kPassTokens) {
    StreamChunks now[kGroups];
    if constexpr (kUpdates<kForm>) {
      UpdateCoefficients by[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        by[g] = load_coefficients(seam.update, min(pass + g * kGroupTokens + lane / 4, end - 1));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t token = pass + g * kGroupTokens + lane / 4;
        wait_for_copies(kGroups - 1 - g);
#pragma unroll
        for (int j = 0; j < kStreams; ++j) now[g].of[j] = chunks[g].of[j][lane];
        if (token >= end || !has_columns) continue;
        now[g] = update(now[g], chunks[g].of[kStreams][lane], by[g]);
        store_chunks(seam.out_streams, token, column, now[g]);
      }
    } else {
      wait_for_copies(0);
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int j = 0; j < kStreams; ++j) now[g].of[j] = chunks[g].of[j][lane];
    }
    load(pass + sets * kPassTokens);

    float sums[kGroups][kLaneRows][2], squares[kGroups];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      StreamSums<kForm> of_stream[kGroups];
      float stream_squares[kGroups] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& step = memory.rows[unit].step[2 * j + half];
        const uint4 last = step.last[lane];
        const uint2 third = step.last_third[lane];
        uint2 pair[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
          pair[g] = half ? uint2{now[g].of[j].z, now[g].of[j].w} : uint2{now[g].of[j].x, now[g].of[j].y};
        if constexpr (UnitRows<kForm>::kSixteen) {
#pragma unroll
          for (int t = 0; t < kTerms; ++t) {
            const uint4 a = step.sixteen[t][lane];
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
              multiply_add(of_stream[g].of_sixteen, a.x, a.y, a.z, a.w, pair[g].x, pair[g].y);
          }
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          multiply_add(of_stream[g].of_last, last.x, last.y, last.z, last.w, pair[g].x, pair[g].y);
          multiply_add(of_stream[g].of_last, third.x, 0, third.y, 0, pair[g].x, pair[g].y);
          stream_squares[g] = add_squares(pair[g], stream_squares[g]);
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        squares[g] = j == 0 ? stream_squares[g] : squares[g] + stream_squares[g];
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i)
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const float value = of_stream[g].value(i, odd);
            sums[g][i][odd] = j == 0 ? value : sums[g][i][odd] + value;
          }
      }
    }

    // A row: the products, the squares, zeros. The lane has values lane / 4, + 8 and so on of two tokens.
    const auto for_each_value = [&](const auto& put) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float square = sum_over_group(squares[g], 4);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int token = lane % 4 * 2 + odd;
          const float square_of_token = __shfl_sync(kFullWarp, square, token * 4);
#pragma unroll
          for (int i = 0; i < kRow / 8; ++i) {
            const int value = lane / 4 + 8 * i;
            put(g * kGroupTokens + token, value,
                value < kRows    ? sums[g][i < kLaneRows ? i : 0][odd]
                : value == kRows ? square_of_token
                                 : 0.0f);
          }
        }
      }
    };
    if (slice_units == 1) {
      for_each_value([&](int token, int value, float sum) {
        if (pass + token < end) seam.row_of(pass + token - first_token, slice, kRow)[value] = sum;
      });
      continue;
    }
    constexpr int kSumsOfWarp = kPassTokens * Memory::kPitch;
    float* const set_sums = memory.sums + set * slice_units * kSumsOfWarp;
    synchronize_set();  // the sums of the pass before were read
    for_each_value([&](int token, int value, float sum) {
      if (value < Memory::kPitch) set_sums[unit * kSumsOfWarp + token * Memory::kPitch + value] = sum;
    });
    synchronize_set();
    const int units = min(slice_units, seam.units - slice * slice_units);
    for (int i = unit * kWarpLanes + lane; i < static_cast<int>(kPassTokens) * kRow / 4;
         i += slice_units * kWarpLanes) {
      const int token = i / (kRow / 4), quad = i % (kRow / 4);
      if (pass + token >= end) break;
      const float* const from = set_sums + token * Memory::kPitch + quad * 4;
      float4 sum = {};
      if (quad < Memory::kPitch / 4) {
        sum = *reinterpret_cast<const float4*>(from);
        for (int u = 1; u < units; ++u) sum += *reinterpret_cast<const float4*>(from + u * kSumsOfWarp);
      }
      reinterpret_cast<float4*>(seam.row_of(pass + token - first_token, slice, kRow))[quad] = sum;
    }
  }
}

}  // namespace dsv4
