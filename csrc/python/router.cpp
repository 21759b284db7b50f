#include <dsv4/router.h>

#include "bind.h"

namespace dsv4::python {
namespace {

size_t decode_workspace_size(const dsv4_dense_router_decode_args& args) {
  return dsv4_dense_router_decode_workspace_size(extent(args.hidden, 0), extent(args.weight, 0));
}

}  // namespace

void bind_router(py::module_& module) {
  {
    using A = dsv4_hash_router_args;
    bind(module, "hash_router", dsv4_hash_router, &A::token_ids, &A::hash_lut, &A::padding_mask,
         Unused<bool>{/* int64_ids */}, &A::out_weights, &A::out_ids);
  }
  {
    using A = dsv4_hash_router_scored_args;
    bind(module, "hash_router_scored", dsv4_hash_router_scored, &A::token_ids, &A::hash_lut, &A::logits,
         &A::padding_mask, flag(&A::renormalize), &A::scale, &A::epsilon, &A::bias_alt, &A::bias_alt_mask,
         Unused<bool>{/* int64_ids */}, &A::out_weights, &A::out_ids);
  }
  {
    using A = dsv4_hash_router_fused_args;
    bind(module, "hash_router_fused", dsv4_hash_router_fused, &A::token_ids, &A::hash_lut, &A::hidden, &A::weight,
         &A::padding_mask, flag(&A::renormalize), &A::scale, &A::epsilon, Unused<bool>{/* int64_ids */},
         &A::out_weights, &A::out_ids);
  }

  module.def("dense_router_decode_workspace_size", &dsv4_dense_router_decode_workspace_size);
  module.def("hash_router_fused_max_bytes", &dsv4_hash_router_fused_max_bytes);
  {
    using A = dsv4_dense_router_decode_args;
    bind(module, "dense_router_decode", dsv4_dense_router_decode, &A::hidden, &A::weight, &A::bias, &A::top_k,
         flag(&A::renormalize), &A::scale, &A::epsilon, &A::bias_alt, &A::bias_alt_mask, Unused<bool>{/* int64_ids */},
         lent(&A::workspace, decode_workspace_size), &A::out_weights, &A::out_ids);
  }
  {
    using A = dsv4_activation_topk_args;
    bind(module, "activation_topk", dsv4_activation_topk, &A::logits, &A::bias, &A::top_k, &A::score_function,
         flag(&A::renormalize), &A::scale, &A::epsilon, &A::padding_mask, &A::bias_alt, &A::bias_alt_mask,
         Unused<bool>{/* int64_ids */}, &A::out_weights, &A::out_ids);
  }

  // Not a list of members: an output that is not wanted is absent for the C function.
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
