#include <dsv4/router.h>

#include "tensor.h"

namespace dsv4::python {

void bind_router(py::module_& module) {
  module.def("hash_router", [](const Tensor& token_ids, const Tensor& hash_lut, const Tensor& padding_mask,
                               const Tensor& out_weights, const Tensor& out_ids) {
    dsv4_hash_router_args args = {};
    args.token_ids = token_ids.view;
    args.hash_lut = hash_lut.view;
    args.padding_mask = padding_mask.view;
    args.out_weights = out_weights.view;
    args.out_ids = out_ids.view;
    return call(dsv4_hash_router, args, token_ids);
  });

  module.def("hash_router_scored",
             [](const Tensor& token_ids, const Tensor& hash_lut, const Tensor& logits, const Tensor& padding_mask,
                bool renormalize, float scale, float epsilon, const Tensor& out_weights, const Tensor& out_ids) {
    dsv4_hash_router_scored_args args = {};
    args.token_ids = token_ids.view;
    args.hash_lut = hash_lut.view;
    args.logits = logits.view;
    args.padding_mask = padding_mask.view;
    args.renormalize = renormalize;
    args.scale = scale;
    args.epsilon = epsilon;
    args.out_weights = out_weights.view;
    args.out_ids = out_ids.view;
    return call(dsv4_hash_router_scored, args, token_ids);
  });

  module.def("hash_router_fused", [](const Tensor& token_ids, const Tensor& hash_lut, const Tensor& hidden,
                                     const Tensor& weight, const Tensor& padding_mask, bool renormalize, float scale,
                                     float epsilon, const Tensor& out_weights, const Tensor& out_ids) {
    dsv4_hash_router_fused_args args = {};
    args.token_ids = token_ids.view;
    args.hash_lut = hash_lut.view;
    args.hidden = hidden.view;
    args.weight = weight.view;
    args.padding_mask = padding_mask.view;
    args.renormalize = renormalize;
    args.scale = scale;
    args.epsilon = epsilon;
    args.out_weights = out_weights.view;
    args.out_ids = out_ids.view;
    return call(dsv4_hash_router_fused, args, token_ids);
  });

  module.def("dense_router_decode_workspace_size", &dsv4_dense_router_decode_workspace_size);
  module.def("dense_router_decode",
             [](const Tensor& hidden, const Tensor& weight, const Tensor& bias, int top_k, bool renormalize,
                float scale, float epsilon, const Tensor& workspace, const Tensor& out_weights, const Tensor& out_ids) {
    dsv4_dense_router_decode_args args = {};
    args.hidden = hidden.view;
    args.weight = weight.view;
    args.bias = bias.view;
    args.top_k = top_k;
    args.renormalize = renormalize;
    args.scale = scale;
    args.epsilon = epsilon;
    args.workspace = workspace.view;
    args.out_weights = out_weights.view;
    args.out_ids = out_ids.view;
    return call(dsv4_dense_router_decode, args, hidden);
  });

  module.def("activation_topk",
             [](const Tensor& logits, const Tensor& bias, int top_k, int score_function, bool renormalize, float scale,
                float epsilon, const Tensor& padding_mask, const Tensor& bias_alt, const Tensor& bias_alt_mask,
                bool /* int64_ids: out_ids says it */, const Tensor& out_weights, const Tensor& out_ids) {
    dsv4_activation_topk_args args = {};
    args.logits = logits.view;
    args.bias = bias.view;
    args.top_k = top_k;
    args.score_function = score_function;
    args.renormalize = renormalize;
    args.scale = scale;
    args.epsilon = epsilon;
    args.padding_mask = padding_mask.view;
    args.bias_alt = bias_alt.view;
    args.bias_alt_mask = bias_alt_mask.view;
    args.out_weights = out_weights.view;
    args.out_ids = out_ids.view;
    return call(dsv4_activation_topk, args, logits);
  });

  module.def("topk_select", [](const Tensor& scores, int top_k, const Tensor& lengths, bool sorted, bool with_values,
                               const Tensor& out_values, const Tensor& out_ids) {
    dsv4_topk_select_args args = {};
    args.scores = scores.view;
    args.top_k = top_k;
    args.lengths = lengths.view;
    args.sorted = sorted;
    if (with_values) args.out_values = out_values.view;
    args.out_ids = out_ids.view;
    return call(dsv4_topk_select, args, scores);
  });
}

}  // namespace dsv4::python
