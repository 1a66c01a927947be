// torch.Tensor -> TensorView, without PyTorch's headers: through the type's DLPack exchange table (about 0.1 us a
// tensor), or, for a PyTorch that has no such table, through data_ptr(), shape and stride(). None becomes an undefined
// view. The view lives as long as the call: the Python caller holds the tensor.
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

inline void view_from_dlpack(const dlpack::Tensor& t, TensorView& view) {
  check(t.ndim <= kMaxDims,
        "llmengine: tensors of more than " + std::to_string(kMaxDims) + " dimensions are not accepted");
  check(t.lanes == 1 && dtype_from_dlpack(t.code, t.bits, view.dtype), "llmengine: tensor of unsupported dtype");
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim;
  int64_t packed = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    view.sizes[d] = t.shape[d];
    view.strides[d] = t.strides ? t.strides[d] : packed;
    packed *= t.shape[d];
  }
}

inline void view_from_attributes(pybind11::handle tensor, TensorView& view) {
  static const std::unordered_map<std::string, DType> dtypes = {
      {"torch.float32", DType::f32},  {"torch.bfloat16", DType::bf16}, {"torch.float16", DType::f16},
      {"torch.float64", DType::f64},  {"torch.int32", DType::i32},     {"torch.int64", DType::i64},
      {"torch.bool", DType::boolean}, {"torch.uint8", DType::boolean}};
  const auto it = dtypes.find(pybind11::str(tensor.attr("dtype")).cast<std::string>());
  check(it != dtypes.end(), "llmengine: tensor of unsupported dtype");
  const pybind11::tuple sizes = tensor.attr("shape"), strides = tensor.attr("stride")();
  check(sizes.size() <= kMaxDims,
        "llmengine: tensors of more than " + std::to_string(kMaxDims) + " dimensions are not accepted");
  view.dtype = it->second;
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  view.ndim = static_cast<int>(sizes.size());
  for (int d = 0; d < view.ndim; ++d) {
    view.sizes[d] = sizes[d].cast<int64_t>();
    view.strides[d] = strides[d].cast<int64_t>();
  }
}

}  // namespace llmengine

namespace pybind11::detail {

template <>
struct type_caster<llmengine::TensorView> {
  PYBIND11_TYPE_CASTER(llmengine::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;  // value stays undefined
    if (const auto* api = llmengine::exchange_api(Py_TYPE(source.ptr()))) {
      llmengine::dlpack::Tensor t;
      if (api->tensor_from_py_object(source.ptr(), &t) != 0) throw error_already_set();
      llmengine::view_from_dlpack(t, value);
      return true;
    }
    if (!hasattr(source, "data_ptr")) return false;
    llmengine::view_from_attributes(source, value);
    return true;
  }
};

}  // namespace pybind11::detail
