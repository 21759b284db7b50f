#include "core/dtype.h"
#include "core/launch.h"
#include "device/activation.cuh"
#include "device/row.cuh"
#include "router/hash_lookup.cuh"
#include "router/weigh_slot.cuh"

namespace dsv4 {

constexpr int kThreads = 256;

// `group` neighbouring lanes (a power of two, at least k) serve one token, one slot each, and sum their scores by
// shuffles: a fixed order, so the same input gives the same bits.
template <typename TokenId, typename Entry, typename Logit>
__global__ void hash_router_scored_kernel(const TokenId* __restrict__ token_ids, const Entry* __restrict__ table,
                                          const bool* __restrict__ padding_mask, const Logit* __restrict__ logits,
                                          float* __restrict__ weights, int32_t* __restrict__ ids, int64_t tokens,
                                          int64_t vocab, int64_t experts, int64_t logits_stride, int top_k, int group,
                                          bool renormalize, float scale, float epsilon) {
  await_previous_grid();
  const int slot = threadIdx.x & (group - 1);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = thread >> (__ffs(group) - 1);  // a 64-bit division takes about a hundred instructions
  int32_t id = kNoExpert;
  float logit = NAN, score = 0.0f;
  if (token < tokens && slot < top_k) {
    const int64_t row = lookup_row(token_ids, padding_mask, token, vocab);
    const int64_t expert = row >= 0 ? static_cast<int64_t>(table[row * top_k + slot]) : kNoExpert;
    if (expert >= 0 && expert < experts) {
      id = static_cast<int32_t>(expert);
      logit = static_cast<float>(logits[token * logits_stride + expert]);
      score = sqrt_softplus(logit);
    }
  }
  const float weight = weigh_slot(score, [&] { return logit; }, kSqrtSoftplusSlope, group, renormalize, scale, epsilon);
  if (token >= tokens || slot >= top_k) return;
  const int64_t out = token * top_k + slot;
  ids[out] = id;
  weights[out] = weight;
}

}  // namespace dsv4

extern "C" dsv4_status dsv4_hash_router_scored(const dsv4_hash_router_scored_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hash_router_scored");
  const dsv4_hash_router_scored_args args = check.read(given);
  const int top_k = static_cast<int>(check_hash_lookup(check, args));
  const int64_t tokens = extent(args.token_ids, 0);
  check.tensor("logits", args.logits, one_of(DSV4_FLOAT32, DSV4_BFLOAT16), {tokens, kAny}, Layout::kStridedRows);
  check.flag("renormalize", args.renormalize);
  check.number("scale", args.scale);
  check.number("epsilon", args.epsilon, 0.0f);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  const int group = group_for(top_k);
  return with_index_type(args.token_ids.dtype, [&](auto token_id) {
    return with_index_type(args.hash_lut.dtype, [&](auto entry) {
      return with_row_type(args.logits.dtype, [&](auto logit) {
        using TokenId = decltype(token_id);
        using Entry = decltype(entry);
        using Logit = decltype(logit);
        return launch<hash_router_scored_kernel<TokenId, Entry, Logit>>(
            target, {blocks_for(tokens, kThreads / group), kThreads}, static_cast<const TokenId*>(args.token_ids.data),
            static_cast<const Entry*>(args.hash_lut.data), static_cast<const bool*>(args.padding_mask.data),
            static_cast<const Logit*>(args.logits.data), static_cast<float*>(args.out_weights.data),
            static_cast<int32_t*>(args.out_ids.data), tokens, extent(args.hash_lut, 0), extent(args.logits, 1),
            args.logits.stride[0], top_k, group, args.renormalize != 0, args.scale, args.epsilon);
      });
    });
  });
}
