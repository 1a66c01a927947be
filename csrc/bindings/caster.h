// torch.Tensor -> TensorView, without PyTorch's headers: through the type's DLPack exchange table (about 0.1 us a
// tensor), or, for a PyTorch that has no such table, through data_ptr(), shape and stride(). None becomes an undefined
// view. The view lives as long as the call: the Python caller holds the tensor. What is no dense tensor of the module's
// own device is a ValueError (TypeError: no tensor at all) that names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>

#include "bindings/dlpack.h"
#include "common/check.h"
#include "common/tensor.h"

namespace llmengine {

inline bool dtype_from_dlpack(uint8_t code, uint8_t bits, DType& out) {
  if (code == dlpack::kFloat && bits == 32) return out = DType::f32, true;
  if (code == dlpack::kBfloat && bits == 16) return out = DType::bf16, true;
  if (code == dlpack::kFloat && bits == 16) return out = DType::f16, true;
  if (code == dlpack::kFloat && bits == 64) return out = DType::f64, true;
  if (code == dlpack::kInt && bits == 32) return out = DType::i32, true;
  if (code == dlpack::kInt && bits == 64) return out = DType::i64, true;
  if ((code == dlpack::kBool || code == dlpack::kUInt) && bits == 8) return out = DType::boolean, true;
  return false;
}

// The table of a tensor type, or null. Looked up once per type: types of tensors live for ever.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, const dlpack::ExchangeApi*> known;  // guarded by the GIL
  if (auto it = known.find(type); it != known.end()) return it->second;
  const dlpack::ExchangeApi* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), dlpack::kAttribute)) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (api && (api->version.major != dlpack::kMajor || !api->tensor_from_py_object)) api = nullptr;
  return known[type] = api;
}

inline bool on_device(dlpack::DeviceType module, int32_t given) {
  return given == module || (module == dlpack::kCPU && given == dlpack::kCUDAHost);
}

// Where a tensor argument stands: the operator and the argument head every message.
struct Argument {
  const char* op;
  const char* name;
  dlpack::DeviceType device;

  [[noreturn]] void refuse(const std::string& problem) const { fail(std::string(op) + ": " + name + " " + problem); }
  void check(bool condition, const char* problem) const {
    if (!condition) refuse(problem);
  }
  void check_dims(int64_t ndim) const {
    if (ndim <= kMaxDims) return;
    refuse("has " + std::to_string(ndim) + " dimensions; at most " + std::to_string(kMaxDims) + " are accepted");
  }
};

inline TensorView view_from_dlpack(const Argument& argument, const dlpack::Tensor& t) {
  TensorView view;
  argument.check(on_device(argument.device, t.device_type), "is on a device that this module does not serve");
  argument.check_dims(t.ndim);
  argument.check(t.lanes == 1 && dtype_from_dlpack(t.code, t.bits, view.dtype), "has an unsupported dtype");
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim;
  int64_t packed = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    view.sizes[d] = t.shape[d];
    view.strides[d] = t.strides ? t.strides[d] : packed;
    packed *= t.shape[d];
  }
  return view;
}

inline TensorView view_from_attributes(const Argument& argument, pybind11::handle tensor) {
  static const std::unordered_map<std::string, DType> dtypes = {
      {"torch.float32", DType::f32},  {"torch.bfloat16", DType::bf16}, {"torch.float16", DType::f16},
      {"torch.float64", DType::f64},  {"torch.int32", DType::i32},     {"torch.int64", DType::i64},
      {"torch.bool", DType::boolean}, {"torch.uint8", DType::boolean}};
  const auto type = tensor.attr("device").attr("type").cast<std::string>();
  const int32_t device = type == "cpu" ? dlpack::kCPU : type == "cuda" ? dlpack::kCUDA : 0;
  if (!on_device(argument.device, device)) argument.refuse("is on a device that this module does not serve: " + type);
  const auto it = dtypes.find(pybind11::str(tensor.attr("dtype")).cast<std::string>());
  argument.check(it != dtypes.end(), "has an unsupported dtype");
  const pybind11::tuple sizes = tensor.attr("shape"), strides = tensor.attr("stride")();
  argument.check_dims(static_cast<int64_t>(sizes.size()));
  TensorView view;
  view.dtype = it->second;
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  view.ndim = static_cast<int>(sizes.size());
  for (int d = 0; d < view.ndim; ++d) {
    view.sizes[d] = sizes[d].cast<int64_t>();
    view.strides[d] = strides[d].cast<int64_t>();
  }
  return view;
}

inline TensorView view_of(const Argument& argument, pybind11::handle tensor) {
  if (tensor.is_none()) return {};
  try {
    if (const auto* api = exchange_api(Py_TYPE(tensor.ptr()))) {
      dlpack::Tensor t;
      if (api->tensor_from_py_object(tensor.ptr(), &t) != 0) throw pybind11::error_already_set();
      return view_from_dlpack(argument, t);
    }
    if (pybind11::hasattr(tensor, "data_ptr")) return view_from_attributes(argument, tensor);
  } catch (const pybind11::error_already_set& error) {  // PyTorch's: a meta or sparse tensor has no memory to show
    const std::string text = error.what();
    argument.refuse("is no tensor in memory: " + text.substr(0, text.find('\n')));
  }
  throw pybind11::type_error(std::string(argument.op) + ": " + argument.name + " must be a torch.Tensor or None, got " +
                             Py_TYPE(tensor.ptr())->tp_name);
}

// A tensor argument as pybind11 hands it over, before its view is made.
struct TensorObject {
  pybind11::handle object;
};

}  // namespace llmengine

namespace pybind11::detail {

template <>
struct type_caster<llmengine::TensorObject> {
  PYBIND11_TYPE_CASTER(llmengine::TensorObject, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value.object = source;
    return true;
  }
};

}  // namespace pybind11::detail
