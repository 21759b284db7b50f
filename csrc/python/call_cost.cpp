// For the benchmark of calls: what the host spends on an op apart from the launch itself.
#include <dsv4/router.h>
#include <dsv4/testing.h>

#include <chrono>

#include "tensor.h"

namespace dsv4::python {
namespace {

dsv4_status ignore_launch(const dsv4_launch*, void*) { return DSV4_OK; }

}  // namespace

void bind_call_cost(py::module_& module) {
  module.def("leave_out_launches", [](bool leave_out) {
    dsv4_image image = {};
    image.struct_size = sizeof(image);
    if (leave_out) dsv4_image_at(0, &image);
    const dsv4_status status =
        dsv4_observe_launches(image.architecture, 1, leave_out ? ignore_launch : nullptr, nullptr);
    if (status) raise_status(status);
  }, "While true, ops take host tensors and do everything but launch. Affects the whole process.");
  module.def(
      "time_hash_router",
      [](const Tensor& token_ids, const Tensor& hash_lut, const Tensor& out_weights, const Tensor& out_ids, int calls) {
    dsv4_hash_router_args args = {};
    args.struct_size = sizeof(args);
    args.token_ids = token_ids.view;
    args.hash_lut = hash_lut.view;
    args.out_weights = out_weights.view;
    args.out_ids = out_ids.view;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i)
      if (dsv4_status status = dsv4_hash_router(&args, nullptr)) raise_status(status);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return elapsed.count() / calls;
  }, "Seconds of one call of the C function, without Python.");
}

}  // namespace dsv4::python
