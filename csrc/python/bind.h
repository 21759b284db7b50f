// The binding of an op: the members of its C struct in the order in which Python gives their values.
//
//     using A = dsv4_hash_router_args;
//     bind(module, "hash_router", dsv4_hash_router,
//          &A::token_ids, &A::hash_lut, &A::padding_mask, &A::out_weights, &A::out_ids);
//
// A member's type decides what Python gives: a tensor or None for dsv4_tensor, an int for int32_t, a float for float.
// flag, Unused and lent below cover the rest. tests/package/test_interfaces.py compares the names in these
// lists with the declaration of the op in Python.
#pragma once

#include <algorithm>
#include <cstddef>

#include "tensor.h"

namespace dsv4::python {

// A parameter of the Python function: the type of Python's value, and how it is stored in the struct.
template <typename Args, typename T>
struct Member {
  using Value = T;
  T Args::* place;
  void store(Args& args, const T& value) const { args.*place = value; }
};

template <typename Args>
struct Member<Args, dsv4_tensor> {
  using Value = Tensor;
  dsv4_tensor Args::* place;
  void store(Args& args, const Tensor& value) const { args.*place = value.view; }
};

template <typename Args>
struct Flag {
  using Value = bool;
  int32_t Args::* place;
  void store(Args& args, bool value) const { args.*place = value; }
};

// A value that decides the shape or dtype of an output; the C function reads it there.
template <typename T>
struct Unused {
  using Value = T;
  template <typename Args>
  void store(Args&, const T&) const {}
};

// A workspace, of which the op needs size(args) bytes. For None, on a device, it is one that the library lends.
template <typename Args>
struct Lent {
  using Value = Tensor;
  dsv4_tensor Args::* place;
  size_t (*size)(const Args&);
  void store(Args& args, const Tensor& value) const { args.*place = value.view; }
};

template <typename Args>
Lent<Args> lent(dsv4_tensor Args::* place, size_t (*size)(const Args&)) {
  return {place, size};
}

// An extent of a tensor that the op has not checked yet; 0 if it has none.
inline int64_t extent(const dsv4_tensor& tensor, int dimension) {
  return dimension < std::min(tensor.rank, DSV4_MAX_RANK) ? tensor.shape[dimension] : 0;
}

// Nothing to do for most parameters. On the host Python gives a workspace; without one the op says that it is missing.
template <typename Args, typename Parameter>
void lend(const Parameter&, Args&, const Tensor&) {}

template <typename Args>
void lend(const Lent<Args>& parameter, Args& args, const Tensor& like) {
  dsv4_tensor& workspace = args.*parameter.place;
  if (workspace.dtype != DSV4_ABSENT || like.view.dtype == DSV4_ABSENT || like.view.device == DSV4_HOST) return;
  if (dsv4_status status = dsv4_workspace(like.view.device, like.current_stream(), parameter.size(args), &workspace))
    raise_status(status);
}

// A bool in Python.
template <typename Args>
Flag<Args> flag(int32_t Args::* place) {
  return {place};
}

template <typename Args, typename T>
Member<Args, T> parameter(T Args::* place) {
  return {place};
}

template <typename Parameter>
Parameter parameter(Parameter one) {
  return one;
}

template <typename First, typename... Rest>
const First& first_of(const First& first, const Rest&...) {
  return first;
}

template <typename Args, typename... Parameters>
void bind_parameters(py::module_& module, const char* name, dsv4_status (*op)(const Args*, dsv4_stream),
                     Parameters... parameters) {
  module.def(name, [op, parameters...](const typename Parameters::Value&... values) {
    Args args = {};
    (parameters.store(args, values), ...);
    (lend(parameters, args, first_of(values...)), ...);
    return call(op, args, first_of(values...));
  });
}

// The first parameter is a tensor: the op runs on the current stream of its device.
template <typename Args, typename... Members>
void bind(py::module_& module, const char* name, dsv4_status (*op)(const Args*, dsv4_stream), Members... members) {
  bind_parameters(module, name, op, parameter(members)...);
}

}  // namespace dsv4::python
