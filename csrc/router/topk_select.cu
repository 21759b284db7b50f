#include <dsv4/router.h>

#include "core/check.h"
#include "core/launch.h"
#include "device/block_sort.cuh"
#include "device/ordered_key.cuh"
#include "device/reduce.cuh"
#include "device/row.cuh"
#include "device/scan.cuh"
#include "device/top_k.cuh"
#include "router/topk_select_policy.h"

namespace dsv4 {

constexpr int kMaxSelected = 2048;
constexpr int64_t kMaxColumns = int64_t{1} << 20;
constexpr int kMaxCluster = 8;                         // what every architecture grants
constexpr int64_t kMaxRows = INT32_MAX / kMaxCluster;  // a grid has at most 2^31 - 1 blocks

// The kernels' arguments besides the scores.
struct Selection {
  const int32_t* lengths;
  float* values;  // may be null
  int32_t* ids;
  int64_t rows;
  int64_t scores_stride;
  int32_t columns;
  int32_t top_k;
  bool sorted;
  bool in_fours;
};

__device__ inline int row_length(const Selection& selection, int64_t row) {
  return selection.lengths ? min(max(selection.lengths[row], 0), selection.columns) : selection.columns;
}

// Writes a result: its column and value.
template <typename Score>
__device__ inline void write_result(const Selection& selection, const Score* row_scores, int64_t row, int place,
                                    uint32_t key, uint32_t column) {
  const int64_t out = row * selection.top_k + place;
  selection.ids[out] = static_cast<int32_t>(column);
  if (selection.values)
    selection.values[out] = key_is_shared(key) ? static_cast<float>(row_scores[column]) : value_of_key(key);
}

__device__ inline void write_filling(const Selection& selection, int64_t row, int place) {
  const int64_t out = row * selection.top_k + place;
  selection.ids[out] = -1;
  if (selection.values) selection.values[out] = -INFINITY;
}

// ---- Short rows, few results: one warp per row, which stays in registers.

constexpr int kRowsPerBlock = 4;

template <typename Score, int Slots>
__global__ void __launch_bounds__(kRowsPerBlock* kWarpLanes)
    topk_select_short_kernel(const Score* __restrict__ scores, Selection selection) {
  await_previous_grid();
  __shared__ alignas(16) float all_values[kRowsPerBlock][kWarpLanes * Slots];
  __shared__ alignas(16) TopKScratch<kWarpLanes> scratch[kRowsPerBlock];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp;
  if (row >= selection.rows) return;
  const Score* const row_scores = scores + row * selection.scores_stride;
  float values[Slots];
  load_group_row<kWarpLanes>(row_scores, lane, selection.columns, selection.in_fours, values);
  const int length = row_length(selection, row);
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (group_column<kWarpLanes>(lane, slot) >= length) values[slot] = NAN;
  store_group_row<kWarpLanes>(values, lane, all_values[warp]);
  __syncwarp();
  Chosen chosen =
      group_top_k<kWarpLanes>(values, length, selection.top_k, lane, all_values[warp], all_values[warp], scratch[warp]);
  if (!selection.sorted) {  // by column; kNoColumn stays last
    const uint64_t entry = make_entry(chosen.column, __float_as_uint(chosen.payload));
    unsigned rank = 0;
    for (int other = 0; other < kWarpLanes; ++other) {
      const uint32_t one = __shfl_sync(kFullWarp, chosen.column, other);
      rank += one < chosen.column || (one == chosen.column && other < lane);
    }
    __syncwarp();
    scratch[warp].ranked[rank] = entry;
    __syncwarp();
    chosen = {entry_key(scratch[warp].ranked[lane]), __uint_as_float(entry_column(scratch[warp].ranked[lane]))};
  }
  if (lane >= selection.top_k) return;
  if (chosen.column == kNoColumn) return write_filling(selection, row, lane);
  const int64_t out = row * selection.top_k + lane;
  selection.ids[out] = static_cast<int32_t>(chosen.column);
  if (selection.values) selection.values[out] = chosen.payload;
}

// ---- Long rows or many results: the blocks of a cluster share a row. Each reads its part once, into registers.
//
// An entry is a key and its column in one number, so no two entries are equal and the result is unique. Phases:
//   load       keys of the block's part of the row
//   histogram  over bins of keys, summed over the cluster: in which bin does the last selected entry lie?
//   refine     while that bin and what lies before it are too many entries to sort: a histogram within the bin
//   gather     the entries up to the end of the bin, in the cluster's first block
//   sort       them there, and write the first k

constexpr int kThreads = 512;
constexpr uint32_t kFew = 1024;  // a last bin of at most so many entries is sorted, a larger one divided again
constexpr int kGathered = kMaxSelected + kFew;

using Bins = uint32_t[kBins];

struct Bin {
  uint32_t number;
  uint32_t ahead;  // entries in the bins before it
  uint32_t count;
  uint32_t unused;  // read along with the others in one load
};

struct LongShared {
  SortScratch<kThreads> scratch;
  union {
    Bins more_bins;                              // of every other round
    uint64_t entries[kGathered + kSortPadding];  // in the cluster's first block: of all blocks
  };
  uint32_t gathered;  // how many entries there are so far
  Bin bin;
};

// Keys as the long kernel keeps them. A bfloat16's has 16 bits, so that its entries lie close together.
template <typename Score>
constexpr int kKeyShift = 32 - 8 * static_cast<int>(sizeof(Score));
template <typename Score>
constexpr uint32_t kLastKey = kNanKey >> kKeyShift<Score>;

template <typename Score>
__device__ inline uint32_t whole_key(uint32_t key) {
  if (kKeyShift<Score> == 0) return key;
  return key << 16 | (key < 0x8000u ? 0xffffu : 0u);
}

// The first round's bins: sign, five bits of exponent, five of mantissa, so that scores of usual size spread over many
// bins. What is outside [2^-20, 2^12) shares the outermost.
constexpr int kBinShift = 18;                     // a bin's keys, as a power of two
constexpr int kSideBins = kBins / 2;              // for each sign
constexpr int kFirstMagnitude = (127 - 20) * 32;  // bits of 2^-20, shifted

// Nothing (kNoKey) falls into the last bin.
__device__ inline uint32_t bin_of_key(uint32_t key) {
  const uint32_t negative = static_cast<uint32_t>(static_cast<int32_t>(key) >> 31);  // all bits or none
  const int magnitude = static_cast<int>((key ^ negative ^ 0x7fffffffu) >> kBinShift);
  const int side = min(max(magnitude - kFirstMagnitude, 0), kSideBins - 1);
  return kSideBins + (side ^ static_cast<int>(~negative));
}

// First and last key of a bin.
__device__ inline uint32_t first_key_of(uint32_t bin) {
  if (bin == 0) return 0;
  if (bin == kSideBins) return 0x80000000u;
  if (bin > kSideBins) return 0x80000000u + ((bin - kSideBins + kFirstMagnitude) << kBinShift);
  return 0x80000000u - ((kSideBins - bin + kFirstMagnitude) << kBinShift);
}
__device__ inline uint32_t last_key_of(uint32_t bin) { return bin == kBins - 1 ? kNanKey : first_key_of(bin + 1) - 1; }

__device__ inline uint32_t* bins_of_turn(LongShared& shared, int turn) {
  return turn % 2 ? shared.more_bins : shared.scratch.bins;
}

// The bin with the entry of rank `rank` (from 0) among all that the cluster's blocks counted in bins_of_turn(turn).
__device__ Bin find_bin(LongShared& shared, int turn, uint32_t rank) {
  uint32_t* const bins = bins_of_turn(shared, turn);
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  constexpr int kBinsEach = kBins / kThreads;
  uint32_t counts[kBinsEach] = {};
  const unsigned blocks = __clusterSizeInBlocks();
#pragma unroll 2
  for (unsigned block = 0; block < blocks; ++block)
    add_own_bins<kThreads>(static_cast<const uint32_t*>(__cluster_map_shared_rank(bins, block)), counts);
  uint32_t sum = 0;
#pragma unroll
  for (const uint32_t count : counts) sum += count;
  uint32_t total;
  uint32_t ahead = sum_before<kThreads>(sum, shared.scratch.warp_sums, &total);
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    if (ahead <= rank && rank < ahead + counts[i]) shared.bin = {threadIdx.x * kBinsEach + i, ahead, counts[i], 0};
    ahead += counts[i];
  }
  __syncthreads();
  return shared.bin;
}

// Where the last selected entry of a row lies: among the entries first to last, the one of rank `selected - ahead - 1`.
template <typename Score>
struct Search {
  uint32_t length, selected;
  uint64_t first, last;
  uint32_t ahead;  // entries before `first`
  uint32_t count;  // entries from `first` to `last`
  int turn = 1;    // of the next histogram

  __device__ __forceinline__ Search(int length, int top_k, int column_bits)
      : length(length), selected(min(length, top_k)) {
    first = 0, last = uint64_t{kLastKey<Score>} << column_bits | all_columns(column_bits);
    ahead = 0, count = length;
  }
  __device__ __forceinline__ static uint64_t all_columns(int column_bits) { return (uint64_t{1} << column_bits) - 1; }

  // Whether the first histogram is needed, and what its bin says.
  __device__ __forceinline__ bool is_wide() const { return count > kFew && count > selected; }
  __device__ __forceinline__ void take_first(const Bin& bin, int column_bits) {
    first = uint64_t{first_key_of(bin.number) >> kKeyShift<Score>} << column_bits;
    last = uint64_t{last_key_of(bin.number) >> kKeyShift<Score>} << column_bits | all_columns(column_bits);
    ahead = bin.ahead;
    count = min(bin.count, length - ahead);  // the last bin may have counted columns behind the row's end
  }

  // Whether another histogram, of the entries first to last, is needed, and what its bin of 2^shift entries says.
  __device__ __forceinline__ bool is_open() const { return count > kFew && ahead + count > selected; }
  __device__ __forceinline__ void take(const Bin& bin, int shift) {
    first += uint64_t{bin.number} << shift;
    last = min(last, first + ((uint64_t{1} << shift) - 1));
    ahead += bin.ahead;
    count = bin.count;
    ++turn;
  }
  __device__ __forceinline__ uint32_t gathered() const { return ahead + count; }
};

// By the cluster's first block: sorts the entries that it has gathered, and writes the row's results.
template <typename Score>
__device__ __forceinline__ void sort_and_write(LongShared& shared, const Selection& selection, const Score* row_scores,
                                               int64_t row, uint32_t gathered, uint32_t selected, int column_bits) {
  const uint64_t all_columns = (uint64_t{1} << column_bits) - 1;
  sort_entries<kThreads, kGathered>(shared.scratch, shared.entries, gathered, column_bits);
  if (!selection.sorted) {  // again, by column
    for (int i = threadIdx.x; i < selected; i += kThreads) {
      const uint64_t entry = shared.entries[i];
      shared.entries[i] = (entry & all_columns) << 32 | entry >> column_bits;
    }
    __syncthreads();
    sort_entries<kThreads, kMaxSelected>(shared.scratch, shared.entries, selected, 32);
  }
  for (int i = threadIdx.x; i < selected; i += kThreads) {
    const uint64_t entry = shared.entries[i];
    const uint32_t key = static_cast<uint32_t>(selection.sorted ? entry >> column_bits : entry);
    const uint32_t column = static_cast<uint32_t>(selection.sorted ? entry & all_columns : entry >> 32);
    write_result(selection, row_scores, row, i, whole_key<Score>(key), column);
  }
  for (int i = selected + threadIdx.x; i < selection.top_k; i += kThreads) write_filling(selection, row, i);
}

// Columns from the thread's first slot to this one: a constant, so it takes no register.
__device__ constexpr int column_offset(int slot) { return slot / kFour * (kThreads * kFour) + slot % kFour; }

// Loads the keys of a block's part of the row, and counts them in `bins`, which are cleared. left: columns from
// first_column to the row's end; may be negative.
template <typename Score, int Slots>
__device__ __forceinline__ void load_keys(const Score* row_scores, int first_column, int left, bool fours, Bins& bins,
                                          uint32_t (&keys)[Slots]) {
  Four<Score> loaded[Slots / kFour];
#pragma unroll
  for (int i = 0; i < Slots / kFour; ++i)
    loaded[i] = load_four(row_scores + first_column, column_offset(i * kFour), left, fours);
  clear_bins<kThreads>(bins);
  __syncthreads();
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    const float value = static_cast<float>(loaded[slot / kFour].values[slot % kFour]);
    const uint32_t key = column_offset(slot) < left ? descending_key(value) : kNoKey;
    keys[slot] = key == kNoKey ? kNoKey : key >> kKeyShift<Score>;
    atomicAdd(&bins[bin_of_key(key)], 1u);
  }
}

// Counts the entries from search.first to search.last in bins of 2^shift.
template <typename Score, int Slots>
__device__ __forceinline__ void count_keys(const uint32_t (&keys)[Slots], int first_column, int column_bits,
                                           const Search<Score>& search, int shift, uint32_t* bins) {
  const uint64_t from_first = first_column - search.first;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    uint32_t key = keys[slot];
    asm volatile("" : "+r"(key)::"memory");  // slot by slot: there are no registers for more
    const uint64_t distance = (uint64_t{key} << column_bits) + (from_first + column_offset(slot));
    if (distance <= search.last - search.first) atomicAdd(&bins[distance >> shift], 1u);
  }
}

// Appends the block's entries up to `last` to those in the cluster's first block, in any order.
template <typename Score, int Slots>
__device__ __forceinline__ void gather_keys(LongShared& shared, const Score* row_scores, const uint32_t (&keys)[Slots],
                                            int first_column, int column_bits, uint64_t last, int turn) {
  const uint32_t last_key = static_cast<uint32_t>(last >> column_bits);
  const int last_offset = static_cast<int>(last & Search<Score>::all_columns(column_bits)) - first_column;
  const auto is_gathered = [&](int slot) {
    return keys[slot] < last_key || (keys[slot] == last_key && column_offset(slot) <= last_offset);
  };
  using Slot = std::conditional_t<(Slots > 32), uint64_t, uint32_t>;
  Slot chosen = 0;  // a bit for each slot
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot)
    if (is_gathered(slot)) chosen |= Slot{1} << slot;
  if (turn > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();  // no block reads bins any more, whose memory the entries take
  }
  const int lane = threadIdx.x % kWarpLanes;
  const uint32_t own = Slots > 32 ? __popcll(chosen) : __popc(static_cast<uint32_t>(chosen));
  const uint32_t up_to = sum_up_to_lane(own);
  uint32_t place = 0;
  if (lane == kWarpLanes - 1 && up_to > 0)
    place = atomicAdd(static_cast<uint32_t*>(__cluster_map_shared_rank(&shared.gathered, 0)), up_to);
  place = __shfl_sync(kFullWarp, place, kWarpLanes - 1) + up_to - own;
  uint64_t* const entries = static_cast<uint64_t*>(__cluster_map_shared_rank(shared.entries, 0));
  for (; chosen; chosen &= chosen - 1) {
    const int slot = (Slots > 32 ? __ffsll(chosen) : __ffs(static_cast<uint32_t>(chosen))) - 1;
    const int column = first_column + column_offset(slot);
    const uint32_t key = descending_key(static_cast<float>(row_scores[column])) >> kKeyShift<Score>;
    entries[place++] = uint64_t{key} << column_bits | static_cast<uint32_t>(column);
  }
}

template <typename Score, int Slots>
__global__ void __launch_bounds__(kThreads, 1)
    topk_select_long_kernel(const Score* __restrict__ scores, Selection selection, int column_bits) {
  await_previous_grid();
  __shared__ alignas(16) LongShared shared;
  const unsigned blocks = __clusterSizeInBlocks(), block = __clusterRelativeBlockRank();
  const int64_t row = blockIdx.x / blocks;
  if (threadIdx.x == 0) shared.gathered = 0;
  __cluster_barrier_arrive_relaxed();
  const Score* const row_scores = scores + row * selection.scores_stride;
  const int length = row_length(selection, row);
  const int first_column = static_cast<int>(block * (kThreads * Slots) + threadIdx.x * kFour);

  uint32_t keys[Slots];
  load_keys(row_scores, first_column, length - first_column, selection.in_fours, shared.scratch.bins, keys);
  __cluster_barrier_wait();  // all blocks run, so their shared memory can be reached

  Search<Score> search(length, selection.top_k, column_bits);
  if (search.is_wide()) {
    search.take_first(find_bin(shared, 0, search.selected - 1), column_bits);
  } else {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();  // the first block's counter is 0
  }
  while (search.is_open()) {
    uint32_t* const bins = bins_of_turn(shared, search.turn);
    clear_bins<kThreads>(bins);  // the others have read them before the last barrier
    __syncthreads();
    const int shift = shift_for(search.last - search.first);
    // Or the compiler keeps shifted keys from turn to turn, for which no registers are left.
    asm volatile("" : "+r"(column_bits));
    count_keys(keys, first_column, column_bits, search, shift, bins);
    search.take(find_bin(shared, search.turn, search.selected - search.ahead - 1), shift);
  }

  gather_keys(shared, row_scores, keys, first_column, column_bits, search.last, search.turn);
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  if (block == 0) sort_and_write(shared, selection, row_scores, row, search.gathered(), search.selected, column_bits);
}

// ---- Rows too long for the registers of a cluster: the same phases, but each histogram reads the row again, from the
// L2 cache.

// Calls function(key, column) for the columns [begin, end) of a row, shared out to the block's threads. begin: a
// multiple of kFour. The key is descending_key()'s, with all its bits.
template <typename Score, typename Function>
__device__ __forceinline__ void for_each_key(const Score* row_scores, int begin, int end, bool fours,
                                             Function&& function) {
  constexpr int kAtOnce = 4;  // loads in flight
  constexpr int kStep = kThreads * kFour;
  for (int first = begin + threadIdx.x * kFour; first < end; first += kAtOnce * kStep) {
    Four<Score> loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) loaded[i] = load_four(row_scores, first + i * kStep, end, fours);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        const int column = first + i * kStep + j;
        if (column < end) function(descending_key(static_cast<float>(loaded[i].values[j])), column);
      }
  }
}

template <typename Score>
__global__ void __launch_bounds__(kThreads, 1)
    topk_select_streamed_kernel(const Score* __restrict__ scores, Selection selection, int column_bits) {
  await_previous_grid();
  __shared__ alignas(16) LongShared shared;
  const int blocks = __clusterSizeInBlocks(), block = __clusterRelativeBlockRank();
  const int64_t row = blockIdx.x / blocks;
  const Score* const row_scores = scores + row * selection.scores_stride;
  const int length = row_length(selection, row);
  const int part = static_cast<int>((length + blocks * kFour - 1) / (blocks * kFour)) * kFour;
  const int begin = min(block * part, length), end = min(begin + part, length);
  const auto entry_of = [&](uint32_t key, int column) {
    return uint64_t{key >> kKeyShift<Score>} << column_bits | static_cast<uint32_t>(column);
  };

  if (threadIdx.x == 0) shared.gathered = 0;
  clear_bins<kThreads>(shared.scratch.bins);
  __syncthreads();
  Search<Score> search(length, selection.top_k, column_bits);
  if (search.is_wide()) {
    for_each_key(row_scores, begin, end, selection.in_fours,
                 [&](uint32_t key, int) { atomicAdd(&shared.scratch.bins[bin_of_key(key)], 1u); });
    search.take_first(find_bin(shared, 0, search.selected - 1), column_bits);
  }
  while (search.is_open()) {
    uint32_t* const bins = bins_of_turn(shared, search.turn);
    clear_bins<kThreads>(bins);  // the others have read them before the last barrier
    __syncthreads();
    const int shift = shift_for(search.last - search.first);
    for_each_key(row_scores, begin, end, selection.in_fours, [&](uint32_t key, int column) {
      const uint64_t distance = entry_of(key, column) - search.first;
      if (distance <= search.last - search.first) atomicAdd(&bins[distance >> shift], 1u);
    });
    search.take(find_bin(shared, search.turn, search.selected - search.ahead - 1), shift);
  }

  // Each block gathers its own entries, in any order, and then appends them to the first block's.
  __cluster_barrier_arrive();
  __cluster_barrier_wait();  // no block reads bins any more, whose memory the entries take
  for_each_key(row_scores, begin, end, selection.in_fours, [&](uint32_t key, int column) {
    const uint64_t entry = entry_of(key, column);
    if (entry <= search.last) shared.entries[atomicAdd(&shared.gathered, 1u)] = entry;
  });
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  if (block != 0) {
    const uint32_t own = shared.gathered;
    if (threadIdx.x == 0)
      shared.bin.number = atomicAdd(static_cast<uint32_t*>(__cluster_map_shared_rank(&shared.gathered, 0)), own);
    __syncthreads();
    uint64_t* const place = static_cast<uint64_t*>(__cluster_map_shared_rank(shared.entries, 0)) + shared.bin.number;
    for (uint32_t i = threadIdx.x; i < own; i += kThreads) place[i] = shared.entries[i];
  }
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  if (block == 0) sort_and_write(shared, selection, row_scores, row, search.gathered(), search.selected, column_bits);
}

constexpr TopkSelectLimits kLimits = {kWarpLanes, kMaxWarpColumns, kThreads, 64, kMaxCluster};

template <typename Function>
static dsv4_status with_long_slots(int64_t thread_columns, Function&& function) {
  switch (thread_columns) {
    case 8: return function(std::integral_constant<int, 8>{});
    case 16: return function(std::integral_constant<int, 16>{});
    case 32: return function(std::integral_constant<int, 32>{});
    default: return function(std::integral_constant<int, 64>{});
  }
}

template <typename Score>
static dsv4_status select(const LaunchTarget& target, const Score* scores, const Selection& selection) {
  const TopkSelectPolicy policy =
      topk_select_policy(*target.device, kLimits, {selection.rows, selection.columns, selection.top_k});
  if (policy.kernel == TopkSelectKernel::kShort)
    return with_slots(selection.columns, [&](auto slots) {
      return launch<topk_select_short_kernel<Score, decltype(slots)::value>>(
          target, {blocks_for(selection.rows, kRowsPerBlock), kRowsPerBlock * kWarpLanes}, scores, selection);
    });
  int column_bits = 0;
  while (int64_t{1} << column_bits < selection.columns) ++column_bits;
  Geometry geometry = {static_cast<uint32_t>(selection.rows) * policy.cluster, kThreads};
  geometry.cluster = policy.cluster;
  if (policy.kernel == TopkSelectKernel::kStreamed)
    return launch<topk_select_streamed_kernel<Score>>(target, geometry, scores, selection, column_bits);
  return with_long_slots(policy.thread_columns, [&](auto slots) {
    return launch<topk_select_long_kernel<Score, decltype(slots)::value>>(target, geometry, scores, selection,
                                                                          column_bits);
  });
}
}  // namespace dsv4

extern "C" dsv4_status dsv4_topk_select(const dsv4_topk_select_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("topk_select");
  const dsv4_topk_select_args args = check.read(given);
  const int64_t rows = extent(args.scores, 0);
  const int64_t columns = extent(args.scores, 1);
  check.tensor("scores", args.scores, one_of(DSV4_FLOAT32, DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.range("scores rows", rows, 0, kMaxRows);
  check.range("scores columns", columns, 0, kMaxColumns);
  check.range("top_k", args.top_k, 1, kMaxSelected);
  check.optional_tensor("lengths", args.lengths, one_of(DSV4_INT32), {rows});
  check.flag("sorted", args.sorted);
  check.optional_tensor("out_values", args.out_values, one_of(DSV4_FLOAT32), {rows, args.top_k});
  check.tensor("out_ids", args.out_ids, one_of(DSV4_INT32), {rows, args.top_k});
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (rows == 0) return DSV4_OK;
  Selection selection = {};
  selection.lengths = static_cast<const int32_t*>(args.lengths.data);
  selection.values = static_cast<float*>(args.out_values.data);
  selection.ids = static_cast<int32_t*>(args.out_ids.data);
  selection.rows = rows;
  selection.scores_stride = args.scores.stride[0];
  selection.columns = static_cast<int32_t>(columns);
  selection.top_k = args.top_k;
  selection.sorted = args.sorted != 0;
  selection.in_fours = in_fours(args.scores);
  return with_row_type(args.scores.dtype, [&](auto score) {
    using Score = decltype(score);
    return select(target, static_cast<const Score*>(args.scores.data), selection);
  });
}
