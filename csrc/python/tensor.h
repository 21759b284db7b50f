// How tensors of any framework reach the C interface: one pybind11 caster, from DLPack to dsv4_tensor.
#pragma once

#include <dsv4/dsv4.h>
#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace dsv4::python {

namespace py = pybind11;

// A tensor argument during a call. Absent if the caller gave None.
struct Tensor {
  dsv4_tensor view = {};
  const dlpack::ExchangeApi* exchange = nullptr;  // of the tensor's type, if it has one
  py::object keep_alive;                          // what owns the view where there is no exchange table

  // The stream that the tensor's framework would use now. Null, the legacy default stream, for frameworks that do not
  // say: __dlpack__() without a stream has made the data ready on that one.
  dsv4_stream current_stream() const;
};

// Fills `out` from a Python object. False, without a Python error, if the object is no tensor.
bool read_tensor(py::handle object, Tensor* out);

// Raises the exception of dsv4_kernels.errors that belongs to the status, with the library's text.
[[noreturn]] void raise_status(dsv4_status status);

// Calls an op on the current stream of `like`. False if the tensors are valid but on the host, so that the caller runs
// the CPU implementation; raises for every other failure.
template <typename Args>
bool call(dsv4_status (*op)(const Args*, dsv4_stream), Args& args, const Tensor& like) {
  args.struct_size = sizeof(Args);
  const dsv4_status status = op(&args, like.current_stream());
  if (status == DSV4_OK) return true;
  if (status == DSV4_ERROR_HOST_TENSOR) return false;
  raise_status(status);
}

// One for each family; adds the family's ops to the module.
void bind_router(py::module_& module);
void bind_cache(py::module_& module);
void bind_moe(py::module_& module);
void bind_stash(py::module_& module);
void bind_mhc(py::module_& module);

void bind_mark_written(py::module_& module);

}  // namespace dsv4::python

namespace pybind11::detail {

template <>
struct type_caster<dsv4::python::Tensor> {
  PYBIND11_TYPE_CASTER(dsv4::python::Tensor, const_name("Tensor | None"));

  bool load(handle source, bool) { return source.is_none() || dsv4::python::read_tensor(source, &value); }
};

}  // namespace pybind11::detail
