#include "tensor.h"

#include <algorithm>
#include <exception>
#include <unordered_map>

#include "torch_tensor.h"

namespace dsv4::python {
namespace {

int32_t dtype_of(const dlpack::DataType& type) {
  // Vectors of elements are no dtype of ours, but for two FP4 codes in a byte.
  if (type.lanes != (type.code == dlpack::kFloat4E2m1fn ? 2 : 1)) return DSV4_UNSUPPORTED;
  const int bits = type.bits * type.lanes;
  switch (type.code) {
    case dlpack::kBool: return bits == 8 ? DSV4_BOOL : DSV4_UNSUPPORTED;
    case dlpack::kUInt: return bits == 8 ? DSV4_UINT8 : DSV4_UNSUPPORTED;
    case dlpack::kInt:
      return bits == 8 ? DSV4_INT8 : bits == 32 ? DSV4_INT32 : bits == 64 ? DSV4_INT64 : DSV4_UNSUPPORTED;
    case dlpack::kFloat:
      return bits == 16 ? DSV4_FLOAT16 : bits == 32 ? DSV4_FLOAT32 : bits == 64 ? DSV4_FLOAT64 : DSV4_UNSUPPORTED;
    case dlpack::kBfloat: return bits == 16 ? DSV4_BFLOAT16 : DSV4_UNSUPPORTED;
    case dlpack::kFloat8E4m3fn: return bits == 8 ? DSV4_FLOAT8_E4M3FN : DSV4_UNSUPPORTED;
    case dlpack::kFloat8E8m0fnu: return bits == 8 ? DSV4_FLOAT8_E8M0FNU : DSV4_UNSUPPORTED;
    case dlpack::kFloat4E2m1fn: return bits == 8 ? DSV4_FLOAT4_E2M1FN_X2 : DSV4_UNSUPPORTED;
    default: return DSV4_UNSUPPORTED;
  }
}

dsv4_tensor view_of(const dlpack::Tensor& from) {
  dsv4_tensor view = {};
  view.data = from.data ? static_cast<char*>(from.data) + from.byte_offset : nullptr;
  view.dtype = dtype_of(from.dtype);
  const bool on_device = from.device.type == dlpack::kCuda || from.device.type == dlpack::kCudaManaged;
  view.device = on_device ? from.device.id : DSV4_HOST;
  view.rank = from.ndim;  // the op refuses ranks above DSV4_MAX_RANK
  int64_t compact = 1;
  for (int i = std::min(from.ndim, DSV4_MAX_RANK) - 1; i >= 0; --i) {
    view.shape[i] = from.shape[i];
    view.stride[i] = from.strides ? from.strides[i] : compact;
    compact *= from.shape[i];
  }
  return view;
}

// What there is to know of the type of an argument.
struct KnownType {
  const dlpack::ExchangeApi* exchange = nullptr;  // null if it has none
  TensorType tensor_type = TensorType::kForeign;
};

const dlpack::ExchangeApi* exchange_of(PyTypeObject* type) {
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* table = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table && table->version.major > 1) table = table->previous;
  return table && table->version.major == 1 && table->tensor_from_object ? table : nullptr;
}

// Looked up once for each type.
KnownType known_type(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, KnownType> known;
  static std::pair<PyTypeObject*, KnownType> last;  // nearly every argument is of one type
  if (last.first == type) return last.second;
  auto found = known.find(type);
  if (found == known.end()) {
    const KnownType made = {exchange_of(type), tensor_type_of(type)};
    found = known.emplace(type, made).first;
    Py_INCREF(type);  // a type that goes away must not leave its address to another one
  }
  last = *found;
  return last.second;
}

}  // namespace

bool read_tensor(py::handle object, Tensor* out) {
  dlpack::Tensor tensor;
  const KnownType type = known_type(Py_TYPE(object.ptr()));
  if (type.tensor_type == TensorType::kDispatched)
    throw py::type_error("expected a plain tensor, got one of a type with a __torch_dispatch__ of its own");
  if (type.tensor_type == TensorType::kPlain) require_readable(object.ptr());
  out->exchange = type.exchange;
  if (out->exchange) {
    if (out->exchange->tensor_from_object(object.ptr(), &tensor)) throw py::error_already_set();
    out->view = view_of(tensor);
    return true;
  }
  if (!py::hasattr(object, "__dlpack__")) return false;
  out->keep_alive = object.attr("__dlpack__")();
  PyObject* capsule = out->keep_alive.ptr();
  if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
    tensor = static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"))->tensor;
  else if (PyCapsule_IsValid(capsule, "dltensor"))
    tensor = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->tensor;
  else
    return false;
  out->view = view_of(tensor);
  return true;
}

void bind_mark_written(py::module_& module) {
  // No pybind11 function: that would take longer to call than this takes.
  const auto mark_written = [](PyObject*, PyObject* tensors) -> PyObject* {
    if (!PyTuple_Check(tensors)) return PyErr_Format(PyExc_TypeError, "mark_written: expected a tuple");
    try {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
        PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
        if (known_type(Py_TYPE(tensor)).tensor_type != TensorType::kForeign) bump_version(tensor);
      }
    } catch (py::error_already_set& error) {
      error.restore();
      return nullptr;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  };
  static PyMethodDef methods[] = {
      {"mark_written", mark_written, METH_O,
       "Raises the version counters of those in a tuple that are torch tensors, as torch's own in-place functions do."},
      {}};
  PyModule_AddFunctions(module.ptr(), methods);
}

dsv4_stream Tensor::current_stream() const {
  void* stream = nullptr;
  if (exchange && view.device != DSV4_HOST && exchange->current_work_stream(dlpack::kCuda, view.device, &stream))
    throw py::error_already_set();
  return static_cast<dsv4_stream>(stream);
}

void raise_status(dsv4_status status) {
  const char* const name = status == DSV4_ERROR_INVALID_ARGUMENT ? "InvalidArgumentError"
                           : status == DSV4_ERROR_NO_DRIVER      ? "NoDriverError"
                           : status == DSV4_ERROR_NO_IMAGE       ? "NoImageError"
                                                                 : "CudaError";
  const py::object type = py::module_::import("dsv4_kernels.errors").attr(name);
  PyErr_SetString(type.ptr(), dsv4_last_error());
  throw py::error_already_set();
}

}  // namespace dsv4::python
