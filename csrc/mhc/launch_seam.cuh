// The host's side of a seam: checks of arguments that several ops have, and the launches.
#pragma once

#include <algorithm>

#include "mhc/finish.cuh"
#include "mhc/projection.cuh"

namespace dsv4 {

// Checks of fn, base and scale, and what the kernel takes of them.
inline void check_projection(Check& check, const dsv4_tensor& fn, const dsv4_tensor& base, const dsv4_tensor& scale,
                             int64_t rows, int64_t scales, int64_t hidden, float epsilon, float hc_epsilon) {
  check.tensor("fn", fn, one_of(DSV4_FLOAT32), {rows, saturating_product(kStreams, hidden)});
  check.aligned_rows("fn", fn, sizeof(float4));
  check.tensor("base", base, one_of(DSV4_FLOAT32), {rows});
  check.tensor("scale", scale, one_of(DSV4_FLOAT32), {scales});
  check.number("epsilon", epsilon, 0.0f);
  check.number("hc_epsilon", hc_epsilon, FLT_MIN);
}

inline void check_coefficients(Check& check, const dsv4_tensor& out_pre, const dsv4_tensor& out_post,
                               const dsv4_tensor& out_comb, float post_factor, int32_t iterations, int64_t tokens) {
  check.number("post_factor", post_factor, 0.0f);
  check.range("sinkhorn_iterations", iterations, 1, 1000);
  check.tensor("out_pre", out_pre, one_of(DSV4_FLOAT32), {tokens, kStreams});
  check.tensor("out_post", out_post, one_of(DSV4_FLOAT32), {tokens, kStreams});
  check.tensor("out_comb", out_comb, one_of(DSV4_FLOAT32), {tokens, kStreams, kStreams});
  check.aligned_rows("out_comb", out_comb, sizeof(float4));
}

inline void check_layer_input(Check& check, const char* name, const dsv4_tensor& out, int64_t tokens, int64_t hidden) {
  check.tensor(name, out, one_of(DSV4_BFLOAT16), {tokens, hidden});
  check.aligned_rows(name, out, sizeof(uint4));
}

inline void check_pre_in(Check& check, const dsv4_tensor& pre_in, int64_t tokens) {
  check.optional_tensor("pre_in", pre_in, one_of(DSV4_FLOAT32), {tokens, kStreams});
  if (present(pre_in)) check.aligned_rows("pre_in", pre_in, sizeof(float4));
}

inline void set_streams(Seam& seam, const dsv4_tensor& streams) {
  seam.streams = streams_of(streams);
  seam.tokens = static_cast<uint32_t>(streams.shape[0]);
  seam.hidden = static_cast<int>(streams.shape[2]);
  seam.units = units_of(seam.hidden);
  seam.reciprocal_hidden = 1.0f / static_cast<float>(seam.hidden);
  seam.reciprocal_width = 1.0f / static_cast<float>(seam.hidden * kStreams);
}

inline void set_projection(Seam& seam, const dsv4_tensor& fn, const dsv4_tensor& base, const dsv4_tensor& scale,
                           float epsilon, float hc_epsilon) {
  seam.fn = static_cast<const float*>(fn.data);
  seam.base = static_cast<const float*>(base.data);
  seam.scale = static_cast<const float*>(scale.data);
  seam.epsilon = epsilon;
  seam.hc_epsilon = hc_epsilon;
}

inline void set_coefficients(Seam& seam, const dsv4_tensor& out_pre, const dsv4_tensor& out_post,
                             const dsv4_tensor& out_comb, float post_factor, int32_t iterations) {
  seam.out_pre = static_cast<float*>(out_pre.data);
  seam.out_post = static_cast<float*>(out_post.data);
  seam.out_comb = static_cast<float*>(out_comb.data);
  seam.post_factor = post_factor;
  seam.iterations = iterations;
}

inline void set_layer_input(Seam& seam, const dsv4_tensor& norm_weight, const dsv4_tensor& out,
                            int32_t norm_unrounded) {
  seam.norm_weight = norm_weight_of(norm_weight);
  seam.out_layer_input = static_cast<__nv_bfloat16*>(out.data);
  seam.norm_unrounded = norm_unrounded != 0;
}

inline void check_workspace(Check& check, const dsv4_tensor& workspace, int64_t tokens, int64_t hidden) {
  check.tensor("workspace", workspace, one_of(DSV4_UINT8), {kAny});
  check.range("workspace bytes", extent(workspace, 0),
              static_cast<int64_t>(dsv4_hyper_connection_workspace_size(tokens, hidden)), INT64_MAX);
  constexpr int64_t kAlignment = 64;  // as of every workspace
  check.aligned_rows("workspace", workspace, kAlignment);
}

template <Form kForm, int kGroups>
dsv4_status launch_projection(const LaunchTarget& target, const Seam& seam, const SeamPolicy& policy,
                              uint32_t first_token, uint32_t end_token) {
  const uint32_t range_tokens =
      blocks_for(blocks_for(end_token - first_token, kGroupTokens), policy.ranges) * kGroupTokens;
  const auto threads = static_cast<uint32_t>(policy.sets * policy.slice_units * kWarpLanes);
  const auto shared = static_cast<uint32_t>(
      ProjectionMemory<kForm, kGroups>::kSizes.of_block(policy.slice_units, policy.sets, kGroups));
  const dim3 grid(seam.slices, blocks_for(end_token - first_token, range_tokens));
  return launch<hyper_connection_project_kernel<kForm, kGroups>>(target, {grid, threads, shared}, seam, first_token,
                                                                 end_token, range_tokens, policy.sets);
}

template <Form kForm, int kTokens, int kChunks>
dsv4_status launch_finish(const LaunchTarget& target, const Seam& seam, uint32_t first_token, uint32_t end_token) {
  // Of a form that has coefficients alone, a warp per token adds the sums.
  const uint32_t workers = kCollapses<kForm> ? blocks_for(seam.hidden, kChunk * kChunks * kWarpLanes) : kTokens;
  const Geometry geometry = {blocks_for(end_token - first_token, kTokens), (workers + 1) * kWarpLanes};
  return launch<hyper_connection_finish_kernel<kForm, kTokens, kChunks>>(target, geometry, seam, first_token,
                                                                         end_token);
}

template <Form kForm>
dsv4_status launch_seam(const LaunchTarget& target, Seam& seam, const dsv4_tensor& workspace) {
  const SeamPolicy policy =
      seam_policy(*target.device, seam.tokens, seam.hidden, ProjectionMemory<kForm, kManyGroups>::kSizes);
  seam.partial_sums = static_cast<float*>(workspace.data);
  seam.slice_units = policy.slice_units;
  seam.slices = static_cast<int>(blocks_for(seam.units, policy.slice_units));
  seam.sum_slices = policy.slice_units == 1 ? units_of_sum(seam.hidden) : 1;
  if (policy.few) {
    if (dsv4_status status = launch_projection<kForm, 1>(target, seam, policy, 0, seam.tokens)) return status;
    constexpr int kOneChunkHidden = (kMostFinishThreads - kWarpLanes) * kChunk;
    return seam.hidden <= kOneChunkHidden ? launch_finish<kForm, 1, 1>(target, seam, 0, seam.tokens)
                                          : launch_finish<kForm, 1, 2>(target, seam, 0, seam.tokens);
  }
  for (uint32_t first = 0; first < seam.tokens; first += policy.part_tokens) {
    const uint32_t end = std::min(seam.tokens, first + policy.part_tokens);
    if (dsv4_status status = launch_projection<kForm, kManyGroups>(target, seam, policy, first, end)) return status;
    if (dsv4_status status = launch_finish<kForm, kManyFinishTokens, 2>(target, seam, first, end)) return status;
  }
  return DSV4_OK;
}

}  // namespace dsv4
