#include <dsv4/mhc.h>

#include "bind.h"

namespace dsv4::python {
namespace {

template <typename Args>
size_t seam_workspace_size(const Args& args) {
  return dsv4_hyper_connection_workspace_size(extent(args.streams, 0), extent(args.streams, 2));
}

}  // namespace

void bind_mhc(py::module_& module) {
  module.def("hyper_connection_workspace_size", &dsv4_hyper_connection_workspace_size);
  {
    using A = dsv4_hyper_connection_pre_args;
    bind(module, "hyper_connection_pre", dsv4_hyper_connection_pre, &A::streams, &A::fn, &A::base, &A::scale,
         &A::pre_in, &A::norm_weight, &A::epsilon, &A::hc_epsilon, &A::post_factor, &A::sinkhorn_iterations,
         flag(&A::norm_unrounded), lent(&A::workspace, seam_workspace_size<A>), &A::out_layer_input, &A::out_pre,
         &A::out_post, &A::out_comb);
  }
  {
    using A = dsv4_hyper_connection_post_args;
    bind(module, "hyper_connection_post", dsv4_hyper_connection_post, &A::x, &A::streams, &A::post, &A::comb,
         &A::out_streams);
  }
  {
    using A = dsv4_hyper_connection_post_pre_args;
    bind(module, "hyper_connection_post_pre", dsv4_hyper_connection_post_pre, &A::x, &A::streams, &A::post, &A::comb,
         &A::fn, &A::base, &A::scale, &A::pre_in, &A::norm_weight, &A::epsilon, &A::hc_epsilon, &A::post_factor,
         &A::sinkhorn_iterations, flag(&A::norm_unrounded), lent(&A::workspace, seam_workspace_size<A>),
         &A::out_streams, &A::out_layer_input, &A::out_pre, &A::out_post, &A::out_comb);
  }
  {
    using A = dsv4_hyper_connection_coefficients_args;
    bind(module, "hyper_connection_coefficients", dsv4_hyper_connection_coefficients, &A::streams, &A::fn, &A::base,
         &A::scale, &A::epsilon, &A::hc_epsilon, &A::post_factor, &A::sinkhorn_iterations,
         lent(&A::workspace, seam_workspace_size<A>), &A::out_pre, &A::out_post, &A::out_comb);
  }
  {
    using A = dsv4_hyper_connection_collapse_args;
    bind(module, "hyper_connection_collapse", dsv4_hyper_connection_collapse, &A::streams, &A::pre, &A::norm_weight,
         &A::epsilon, flag(&A::norm_unrounded), &A::out_hidden);
  }
  {
    using A = dsv4_hyper_connection_head_args;
    bind(module, "hyper_connection_head", dsv4_hyper_connection_head, &A::streams, &A::fn, &A::base, &A::scale,
         &A::norm_weight, &A::epsilon, &A::hc_epsilon, flag(&A::norm_unrounded),
         lent(&A::workspace, seam_workspace_size<A>), &A::out_hidden);
  }
}

}  // namespace dsv4::python
