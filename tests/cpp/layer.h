// One layer's step outside attention, as an engine makes it: route, sort, two grouped products, sum, and the compressed
// cache's flush. Seven calls of the library, whose launches depend on shapes alone: a captured graph follows new
// tokens.
#pragma once

#include <dsv4/cache.h>
#include <dsv4/moe.h>
#include <dsv4/router.h>
#include <dsv4/dsv4.hpp>

#include <vector>

#include "numbers.h"

namespace engine {

constexpr int kSteps = 3;
constexpr int64_t kTokens = 32, kVocab = 1000, kTopK = 6, kExperts = 16;
constexpr int64_t kHidden = 128, kInner = 64;              // an expert's outer and inner width
constexpr int64_t kGroup = 32;                             // weights that share a scale
constexpr int64_t kTile = 16;                              // rows of a tile
constexpr float kLimit = 10.0f;                            // of gate and up
constexpr float kEpsilon = 1e-6f;                          // of the norm
constexpr int32_t kRatio = 4;                              // tokens a cache entry
constexpr int64_t kHeadDim = 512, kRope = 64, kRing = 16;  // kRing: rows of state
constexpr int64_t kPositions = 256, kEntriesPerPage = 64;

// What the host knows of the layer, and what the results are checked against.
struct Problem {
  std::vector<int32_t> table = std::vector<int32_t>(kVocab * kTopK);
  std::vector<uint16_t> hidden = std::vector<uint16_t>(kTokens * kHidden);  // bfloat16
  std::vector<uint8_t> first_codes = std::vector<uint8_t>(kExperts * 2 * kInner * kHidden / 2);
  std::vector<uint8_t> first_scales = std::vector<uint8_t>(kExperts * 2 * kInner * kHidden / kGroup);
  std::vector<uint8_t> second_codes = std::vector<uint8_t>(kExperts * kHidden * kInner / 2);
  std::vector<uint8_t> second_scales = std::vector<uint8_t>(kExperts * kHidden * kInner / kGroup);
  std::vector<float> kv = std::vector<float>(kTokens * 2 * kHeadDim);
  std::vector<float> score = std::vector<float>(kTokens * 2 * kHeadDim);
  std::vector<float> norm_weight = std::vector<float>(kHeadDim);
  std::vector<float> cos_sin = std::vector<float>(kPositions * kRope);
};

// The layer's tensors, in memory of whatever kind.
template <template <typename> class Array>
class Layer {
 public:
  Layer(const Problem& problem, int32_t device)
      : device_(device),
        tiles_(dsv4_moe_sort_max_tiles(kTokens * kTopK, kExperts, kTile)),
        table_(problem.table),
        hidden_(problem.hidden),
        first_codes_(problem.first_codes),
        first_scales_(problem.first_scales),
        second_codes_(problem.second_codes),
        second_scales_(problem.second_scales),
        kv_(problem.kv),
        score_(problem.score),
        norm_weight_(problem.norm_weight),
        cos_sin_(problem.cos_sin) {}

  // Enqueues the step. Throws dsv4::Error with the library's text if it refuses anything.
  void step(dsv4_stream stream) const {
    route(stream);
    run_experts(stream);
    flush(stream);
  }

 private:
  template <typename T>
  dsv4_tensor view(const Array<T>& array, std::initializer_list<int64_t> shape) const {
    return dsv4::view(array.data(), shape, device_);
  }
  dsv4_tensor bfloat16(const Array<uint16_t>& array, std::initializer_list<int64_t> shape) const {
    return dsv4::view(array.data(), DSV4_BFLOAT16, shape, device_);
  }

  void route(dsv4_stream stream) const {
    auto args = dsv4::args<dsv4_hash_router_args>();
    args.token_ids = view(token_ids, {kTokens});
    args.hash_lut = view(table_, {kVocab, kTopK});
    args.out_weights = view(weights, {kTokens, kTopK});
    args.out_ids = view(ids, {kTokens, kTopK});
    dsv4::call(dsv4_hash_router, args, stream);
  }

  void run_experts(dsv4_stream stream) const {
    auto sort = dsv4::args<dsv4_moe_sort_args>();
    sort.topk_ids = view(ids, {kTokens, kTopK});
    sort.out_tile_to_expert = view(tile_to_expert_, {tiles_});
    sort.out_tile_rows = view(tile_rows_, {tiles_});
    sort.out_row_to_slot = view(row_to_slot_, {tiles_ * kTile});
    sort.out_slot_to_row = view(slot_to_row_, {kTokens, kTopK});
    sort.out_counts = view(counts_, {2});
    sort.local_experts = kExperts;
    sort.tile_size = kTile;
    dsv4::call(dsv4_moe_sort, sort, stream);

    auto first = dsv4::args<dsv4_moe_grouped_gemm_args>();
    first.x = bfloat16(hidden_, {kTokens, kHidden});
    first.weight = view(first_codes_, {kExperts, 2 * kInner, kHidden / 2});
    first.weight_scale = view(first_scales_, {kExperts, 2 * kInner, kHidden / kGroup});
    first.tile_to_expert = sort.out_tile_to_expert;
    first.row_to_slot = sort.out_row_to_slot;
    first.out = bfloat16(inner_rows_, {tiles_ * kTile, kInner});
    first.top_k = kTopK;
    first.swiglu = 1;
    first.limit = kLimit;
    dsv4::call(dsv4_moe_grouped_gemm, first, stream);

    auto second = dsv4::args<dsv4_moe_grouped_gemm_args>();
    second.x = first.out;
    second.weight = view(second_codes_, {kExperts, kHidden, kInner / 2});
    second.weight_scale = view(second_scales_, {kExperts, kHidden, kInner / kGroup});
    second.tile_to_expert = sort.out_tile_to_expert;
    second.row_to_slot = sort.out_row_to_slot;
    second.out = bfloat16(outer_rows_, {tiles_ * kTile, kHidden});
    dsv4::call(dsv4_moe_grouped_gemm, second, stream);

    auto finalize = dsv4::args<dsv4_moe_finalize_args>();
    finalize.rows = second.out;
    finalize.slot_to_row = sort.out_slot_to_row;
    finalize.weights = view(weights, {kTokens, kTopK});
    finalize.out = bfloat16(sums, {kTokens, kHidden});
    dsv4::call(dsv4_moe_finalize, finalize, stream);
  }

  void flush(dsv4_stream stream) const {
    auto args = dsv4::args<dsv4_compress_flush_args>();
    args.kv = view(kv_, {kTokens, 2 * kHeadDim});
    args.score = view(score_, {kTokens, 2 * kHeadDim});
    args.query_starts = view(query_starts_, {2});
    args.start_positions = view(start_positions, {1});
    args.state = view(state_, {1, kRing, 2, 2 * kHeadDim});
    args.state_table = view(state_table_, {1, 1});
    args.norm_weight = view(norm_weight_, {kHeadDim});
    args.cos_sin = view(cos_sin_, {kPositions, kRope});
    args.pages = dsv4::view(pages.data(), DSV4_UINT8, {1, kEntriesPerPage * kHeadDim * 2}, device_);
    args.block_table = view(block_table_, {1, 1});
    args.ratio = kRatio;
    args.overlap = 1;
    args.layout = DSV4_PAGE_BF16;
    args.entries_per_page = kEntriesPerPage;
    args.epsilon = kEpsilon;
    dsv4::call(dsv4_compress_flush, args, stream);
  }

  template <typename T>
  static Array<T> filled(int64_t count, T value = 0) {
    return Array<T>(std::vector<T>(static_cast<size_t>(count), value));
  }

  int32_t device_;
  int64_t tiles_;
  Array<int32_t> table_;
  Array<uint16_t> hidden_;
  Array<uint8_t> first_codes_, first_scales_, second_codes_, second_scales_;
  Array<float> kv_, score_, norm_weight_, cos_sin_;
  // Between the calls.
  Array<int32_t> tile_to_expert_ = filled<int32_t>(tiles_), tile_rows_ = filled<int32_t>(tiles_);
  Array<int32_t> row_to_slot_ = filled<int32_t>(tiles_ * kTile), slot_to_row_ = filled<int32_t>(kTokens * kTopK);
  Array<int32_t> counts_ = filled<int32_t>(2);
  Array<uint16_t> inner_rows_ = filled<uint16_t>(tiles_ * kTile * kInner);
  Array<uint16_t> outer_rows_ = filled<uint16_t>(tiles_ * kTile * kHidden);
  // One request, one page of state, one page of entries.
  Array<int32_t> query_starts_ = Array<int32_t>({0, kTokens}), state_table_ = filled<int32_t>(1);
  Array<int32_t> block_table_ = filled<int32_t>(1);
  Array<float> state_ = filled<float>(kRing * 2 * 2 * kHeadDim);

 public:
  // What a step reads anew, and what it leaves.
  Array<int64_t> token_ids = filled<int64_t>(kTokens);
  Array<int32_t> start_positions = filled<int32_t>(1);
  Array<float> weights = filled<float>(kTokens * kTopK);
  Array<int32_t> ids = filled<int32_t>(kTokens * kTopK);
  Array<uint16_t> sums = filled<uint16_t>(kTokens * kHidden);
  Array<uint16_t> pages = filled<uint16_t>(kEntriesPerPage * kHeadDim);
};

}  // namespace engine
