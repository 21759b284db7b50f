#include <dsv4/moe.h>

#include "tensor.h"

namespace dsv4::python {

void bind_moe(py::module_& module) {
  module.def("padded_squared_relu",
             [](const Tensor& x, const Tensor& permutation_map, const Tensor& n_used, const Tensor& out) {
    dsv4_padded_squared_relu_args args = {};
    args.x = x.view;
    args.permutation_map = permutation_map.view;
    args.n_used = n_used.view;
    args.out = out.view;
    return call(dsv4_padded_squared_relu, args, x);
  });
}

}  // namespace dsv4::python
