#include <tuple>

#include "tensor.h"
#include "torch_tensor.h"

PYBIND11_MODULE(_native, module) {
  using namespace dsv4::python;
  module.doc() = "The C interface of libdsv4_kernels.so. Ops return False for valid arguments in host memory.";
  module.def("version", &dsv4_version);
  module.def("preload", [](int device) {
    if (dsv4_status status = dsv4_preload(device)) raise_status(status);
  });
  module.def("device_error", [](int device) -> py::object {
    if (dsv4_device_status(device) == DSV4_OK) return py::none();
    return py::str(dsv4_last_error());
  });
  module.def("workspace_usage", [](int device) {
    dsv4_workspace_report report = {};
    report.struct_size = sizeof(report);
    if (dsv4_status status = dsv4_workspace_usage(device, &report)) raise_status(status);
    return std::make_tuple(report.stream_blocks, report.graph_blocks, report.free_blocks, report.bytes);
  }, "Blocks of dsv4_workspace() on a device: of streams, of graphs, free; and the bytes of all.");
  bind_mark_written(module);
  module.def("use_torch_functions", &use_torch_functions,
             "For tests: False has Python asked about tensors, not libtorch_cpu. Returns whether that is asked now.");
  bind_router(module);
  bind_cache(module);
  bind_moe(module);
  bind_stash(module);
  bind_mhc(module);
}
