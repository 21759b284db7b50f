#include "core/dtype.h"
#include "core/launch.h"
#include "device/activation.cuh"
#include "device/row.cuh"
#include "device/top_k.cuh"
#include "router/activation_topk.h"
#include "router/hash_lookup.cuh"
#include "router/image_bias.h"
#include "router/weigh_slot.cuh"

namespace dsv4 {

constexpr int kThreads = 256;

// `group` neighbouring lanes (a power of two, at least k) serve one token, one slot each, and sum their scores by
// shuffles: a fixed order, so the same input gives the same bits.
template <typename Entry, typename Logit>
__global__ void hash_router_scored_kernel(StridedIndices token_ids, const Entry* __restrict__ table,
                                          const bool* __restrict__ padding_mask, const Logit* __restrict__ logits,
                                          float* __restrict__ weights, OutIndices ids, int64_t tokens, int64_t vocab,
                                          int64_t experts, int64_t logits_stride, int top_k, int group,
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
  ids.store(out, id);
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
  check_image_bias(check, args.bias_alt, args.bias_alt_mask, tokens, extent(args.logits, 1));
  if (present(args.bias_alt)) {
    check.range("logits columns (experts, with bias_alt)", extent(args.logits, 1), 1, kMaxWarpColumns);
    check.range("hash_lut columns (k, with bias_alt)", top_k, 1, extent(args.logits, 1));
  }
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  // Tokens that choose by a bias need the whole row: all tokens then run in the kernel that reads it.
  if (present(args.bias_alt)) {
    Gate gate = gate_of(args, top_k);
    gate.token_ids = strided_indices_of(args.token_ids);
    gate.table = indices_of(args.hash_lut);
    gate.vocab = extent(args.hash_lut, 0);
    return route_by_logits(target, args.logits, gate);
  }
  const int group = group_for(top_k);
  return with_index_type(args.hash_lut.dtype, [&](auto entry) {
    return with_row_type(args.logits.dtype, [&](auto logit) {
      using Entry = decltype(entry);
      using Logit = decltype(logit);
      return launch<hash_router_scored_kernel<Entry, Logit>>(
          target, {blocks_for(tokens, kThreads / group), kThreads}, strided_indices_of(args.token_ids),
          static_cast<const Entry*>(args.hash_lut.data), static_cast<const bool*>(args.padding_mask.data),
          static_cast<const Logit*>(args.logits.data), static_cast<float*>(args.out_weights.data),
          out_indices_of(args.out_ids), tokens, extent(args.hash_lut, 0), extent(args.logits, 1), args.logits.stride[0],
          top_k, group, args.renormalize != 0, args.scale, args.epsilon);
    });
  });
}
