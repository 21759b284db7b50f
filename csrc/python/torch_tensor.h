// What DLPack does not say of a torch tensor, and what a kernel must tell torch.
//
// The package is compiled without torch's headers and linked without its libraries. A few functions that libtorch_cpu
// exports answer in nanoseconds; where a torch has none of that name, Python is asked, which takes longer.
#pragma once

#include <pybind11/pybind11.h>

namespace dsv4::python {

enum class TensorType {
  kForeign,     // no type of torch
  kPlain,       // torch's, and read as the memory that it is
  kDispatched,  // torch's, with a __torch_dispatch__ of its own: what its memory means is for that to say
};

TensorType tensor_type_of(PyTypeObject* type);

// Raises TypeError if the memory of a plain torch tensor is not its value (lazy negation), or if it requires a gradient
// while gradients are recorded: no op has a backward.
void require_readable(PyObject* tensor);

// Raises the version counter of a torch tensor that a kernel wrote to.
void bump_version(PyObject* tensor);

// For tests: false has Python asked. Returns whether the functions of libtorch_cpu are asked now; they are not before
// the first tensor was seen.
bool use_torch_functions(bool use);

}  // namespace dsv4::python
