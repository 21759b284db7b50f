#include "torch_tensor.h"

#include <dlfcn.h>

#include <cstdint>

namespace dsv4::python {

namespace py = pybind11;

namespace {

// An at::Tensor holds one pointer, to its c10::TensorImpl; a reference to an at::Tensor is the address of that.
using TensorReference = void* const*;

// Functions of libtorch_cpu and of libc10, and where a torch.Tensor object holds its at::Tensor.
struct Torch {
  bool (*is_neg)(TensorReference) = nullptr;
  bool (*is_inference)(TensorReference) = nullptr;
  bool (*requires_grad)(const void* impl) = nullptr;
  bool (*grad_mode_is_enabled)() = nullptr;
  void (*bump_version)(TensorReference) = nullptr;
  Py_ssize_t offset = 0;

  TensorReference of(PyObject* tensor) const {
    return reinterpret_cast<TensorReference>(reinterpret_cast<char*>(tensor) + offset);
  }
};

template <typename Function>
bool find(void* library, const char* symbol, Function* out) {
  *out = reinterpret_cast<Function>(dlsym(library, symbol));
  return *out != nullptr;
}

// Fills `out`, with a torch tensor to look at. False if this torch lacks any of it.
bool find_torch(PyObject* tensor, Torch* out) {
  void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // stays open: torch is never unloaded
  if (!library || !find(library, "_ZN2at6native6is_negERKNS_6TensorE", &out->is_neg) ||
      !find(library, "_ZN2at6native12is_inferenceERKNS_6TensorE", &out->is_inference) ||
      !find(library, "_ZNK3c1010TensorImpl13requires_gradEv", &out->requires_grad) ||
      !find(library, "_ZN3c108GradMode10is_enabledEv", &out->grad_mode_is_enabled) ||
      !find(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &out->bump_version))
    return false;
  // torch says which TensorImpl the object stands for. It is one of the pointers in the object.
  void* const impl = reinterpret_cast<void*>(py::handle(tensor).attr("_cdata").cast<uintptr_t>());
  const Py_ssize_t end = Py_TYPE(tensor)->tp_basicsize - static_cast<Py_ssize_t>(sizeof(void*));
  for (out->offset = sizeof(PyObject); out->offset <= end; out->offset += sizeof(void*))
    if (*out->of(tensor) == impl) return true;
  return false;
}

// Found with the first tensor. Everything here runs under the GIL.
enum class Search { kNotYet, kFound, kFailed };
Search search = Search::kNotYet;
bool wanted = true;
Torch functions;

// Null where Python must be asked.
const Torch* torch_of(PyObject* tensor) {
  if (search == Search::kNotYet) search = find_torch(tensor, &functions) ? Search::kFound : Search::kFailed;
  return wanted && search == Search::kFound ? &functions : nullptr;
}

[[noreturn]] void raise_type_error(const char* text) {
  PyErr_SetString(PyExc_TypeError, text);
  throw py::error_already_set();
}

}  // namespace

TensorType tensor_type_of(PyTypeObject* type) {
  // A type of torch's was made by a torch that is imported; no other may import it.
  const py::object torch = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()));
  const py::handle of = reinterpret_cast<PyObject*>(type);
  if (!torch || !py::hasattr(torch, "Tensor")) return TensorType::kForeign;
  const py::object tensor = torch.attr("Tensor");
  if (!PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(tensor.ptr()))) return TensorType::kForeign;
  const bool own = !of.attr("__torch_dispatch__").is(tensor.attr("__torch_dispatch__"));
  return own ? TensorType::kDispatched : TensorType::kPlain;
}

void require_readable(PyObject* tensor) {
  bool negated, recorded;
  if (const Torch* const torch = torch_of(tensor)) {
    negated = torch->is_neg(torch->of(tensor));
    recorded = torch->requires_grad(*torch->of(tensor)) && torch->grad_mode_is_enabled();
  } else {
    const py::handle object = tensor;
    negated = object.attr("is_neg")().cast<bool>();
    recorded = object.attr("requires_grad").cast<bool>() &&
               py::module_::import("torch").attr("is_grad_enabled")().cast<bool>();
  }
  if (negated) raise_type_error("expected a tensor without lazy negation: resolve_neg() makes one");
  if (recorded) raise_type_error("expected a tensor that requires no gradient: detach() makes one");
}

void bump_version(PyObject* tensor) {
  if (const Torch* const torch = torch_of(tensor)) {
    if (!torch->is_inference(torch->of(tensor))) torch->bump_version(torch->of(tensor));  // those have no counter
  } else {
    py::module_::import("torch.autograd.graph").attr("increment_version")(py::handle(tensor));
  }
}

bool use_torch_functions(bool use) {
  wanted = use;
  return wanted && search == Search::kFound;
}

}  // namespace dsv4::python
