#include <dsv4/router.h>

#include <algorithm>

#include "core/check.h"
#include "router/dense_router_decode_policy.h"
#include "router/image_bias.h"

namespace dsv4 {
namespace {

constexpr int64_t kMaxTokens = largest_of(&DecodeConstants::max_tokens);
constexpr int64_t kMaxExperts = largest_of(&DecodeConstants::max_experts);
constexpr int64_t kHiddenMultiple = kDecode.unit;
constexpr int64_t kMaxHiddenSplits = kDecode.max_splits;
constexpr size_t kPresenceBytes = kDecode.presence_bytes;
constexpr int64_t kLoadBytes = 16;
constexpr int64_t kWorkspaceAlignment = 64;

}  // namespace
}  // namespace dsv4

extern "C" size_t dsv4_dense_router_decode_workspace_size(int64_t tokens, int64_t experts) {
  if (tokens <= 0 || experts <= 0 || tokens > dsv4::kMaxTokens || experts > dsv4::kMaxExperts) return 0;
  return dsv4::kPresenceBytes + sizeof(float) * static_cast<size_t>(tokens * experts * dsv4::kMaxHiddenSplits);
}

extern "C" dsv4_status dsv4_dense_router_decode(const dsv4_dense_router_decode_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("dense_router_decode");
  const dsv4_dense_router_decode_args args = check.read(given);
  const int64_t tokens = extent(args.hidden, 0);
  const int64_t hidden_size = extent(args.hidden, 1);
  const int64_t experts = extent(args.weight, 0);
  check.tensor("hidden", args.hidden, one_of(DSV4_BFLOAT16), {kAny, kAny}, Layout::kStridedRows);
  check.range("hidden rows (tokens)", tokens, 0, kMaxTokens);
  check.range("hidden columns", hidden_size, kHiddenMultiple, INT32_MAX);
  check.multiple("hidden columns", hidden_size, kHiddenMultiple);
  check.aligned_rows("hidden", args.hidden, kLoadBytes);
  check.tensor("weight", args.weight, one_of(DSV4_BFLOAT16), {kAny, hidden_size}, Layout::kStridedRows);
  check.range("weight rows (experts)", experts, 1, kMaxExperts);
  check.aligned_rows("weight", args.weight, kLoadBytes);
  check.optional_tensor("bias", args.bias, one_of(DSV4_FLOAT32), {experts});
  check.range("top_k", args.top_k, 1, std::min<int64_t>(DSV4_MAX_TOP_K, experts));
  check.flag("renormalize", args.renormalize);
  check.number("scale", args.scale);
  check.number("epsilon", args.epsilon, 0.0f);
  const int64_t workspace_bytes = static_cast<int64_t>(dsv4_dense_router_decode_workspace_size(tokens, experts));
  check.tensor("workspace", args.workspace, one_of(DSV4_UINT8), {kAny});
  check.range("workspace bytes", extent(args.workspace, 0), workspace_bytes, INT64_MAX);
  check.aligned_rows("workspace", args.workspace, kWorkspaceAlignment);
  check.tensor("out_weights", args.out_weights, one_of(DSV4_FLOAT32), {tokens, args.top_k});
  check.tensor("out_ids", args.out_ids, one_of(DSV4_INT32, DSV4_INT64), {tokens, args.top_k});
  check_image_bias(check, args.bias_alt, args.bias_alt_mask, tokens, experts);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  auto* const workspace = static_cast<unsigned char*>(args.workspace.data);
  const DenseRouterDecodePolicy policy = dense_router_decode_policy(*target.device, tokens, experts, hidden_size);
  const int32_t units = static_cast<int32_t>(hidden_size / kHiddenMultiple);
  return (*policy.kernel)(target, {policy.expert_tiles, policy.splits}, args.hidden.data, args.weight.data,
                          args.bias.data, args.bias_alt.data, args.bias_alt_mask.data, workspace + kPresenceBytes,
                          workspace, args.out_weights.data, args.out_ids.data, args.hidden.stride[0],
                          args.weight.stride[0], static_cast<int32_t>(tokens), units / policy.splits,
                          units % policy.splits, static_cast<int32_t>(experts), args.top_k, args.renormalize,
                          args.out_ids.dtype == DSV4_INT64, args.scale, args.epsilon);
}
