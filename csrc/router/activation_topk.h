// The kernel that chooses from whole rows of logits, for the ops that end in it.
#pragma once

#include "core/check.h"
#include "core/launch.h"
#include "device/indices.cuh"
#include "device/row.cuh"

namespace dsv4 {

struct Gate {
  const float* bias;
  const float* bias_alt;
  const bool* bias_alt_mask;
  const bool* padding_mask;
  float* weights;
  OutIndices ids;
  // The experts of tokens that bias_alt_mask does not mark, [vocab, top_k]; without data, they are chosen by bias.
  Indices table;
  StridedIndices token_ids;
  int64_t vocab;
  int64_t tokens;
  int64_t logits_stride;
  int32_t experts;
  int32_t top_k;
  int32_t score_function;
  bool renormalize;
  bool logits_in_fours;
  bool bias_in_fours;
  float scale;
  float epsilon;
};

// What ops have in common, from their arguments. The bias, the table and the score function are 0.
template <typename Args>
Gate gate_of(const Args& args, int top_k) {
  Gate gate = {};
  gate.bias_alt = static_cast<const float*>(args.bias_alt.data);
  gate.bias_alt_mask = static_cast<const bool*>(args.bias_alt_mask.data);
  gate.padding_mask = static_cast<const bool*>(args.padding_mask.data);
  gate.weights = static_cast<float*>(args.out_weights.data);
  gate.ids = out_indices_of(args.out_ids);
  gate.tokens = extent(args.logits, 0);
  gate.logits_stride = args.logits.stride[0];
  gate.experts = static_cast<int32_t>(extent(args.logits, 1));
  gate.top_k = top_k;
  gate.renormalize = args.renormalize != 0;
  gate.logits_in_fours = in_fours(args.logits);
  gate.bias_in_fours = !present(args.bias_alt) || in_fours(args.bias_alt);
  gate.scale = args.scale;
  gate.epsilon = args.epsilon;
  return gate;
}

// Launches it. logits were checked: float32 or bfloat16, at least one row, at most kMaxWarpColumns columns.
dsv4_status route_by_logits(const LaunchTarget& target, const dsv4_tensor& logits, const Gate& gate);

}  // namespace dsv4
