// Makes a Python function of an operator: its arguments, all of them required and given by keyword, are the fields of
// the operator's Params struct.
//
// The function is a plain C one. pybind11's dispatcher would gather the arguments in a dictionary and look each up
// there by a string that it makes for the purpose: for a dozen of them as dear as a small kernel. Here they are found
// by the addresses of their names, which are interned on both sides, and in order.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/caster.h"
#include "ops/fields.h"

namespace llmengine {

using TensorList = std::vector<TensorView>;

template <class T>
constexpr const char* python_type() {
  if constexpr (std::is_same_v<T, TensorView>) return "torch.Tensor | None";
  if constexpr (std::is_same_v<T, TensorList>) return "list[torch.Tensor]";
  if constexpr (std::is_same_v<T, bool>) return "bool";
  if constexpr (std::is_integral_v<T>) return "int";
  if constexpr (std::is_floating_point_v<T>) return "float";
  if constexpr (std::is_same_v<T, std::string>) return "str";
  if constexpr (std::is_same_v<T, std::vector<int64_t>>) return "list[int]";
}

// A field's value; what has another type than the field's is an error that names it (of a bool, what has no truth).
template <class T>
T taken(const Argument& argument, pybind11::handle value) {
  if constexpr (std::is_same_v<T, TensorView>) {
    return view_of(argument, value);
  } else {
    using Given = std::conditional_t<std::is_same_v<T, TensorList>, std::vector<TensorObject>, T>;
    pybind11::detail::make_caster<Given> caster;
    if (!caster.load(value, true)) {
      throw pybind11::type_error(std::string(argument.op) + ": " + argument.name + " must be " + python_type<T>() +
                                 ", got " + Py_TYPE(value.ptr())->tp_name);
    }
    if constexpr (std::is_same_v<T, TensorList>) {
      TensorList views;
      for (const TensorObject& tensor : static_cast<std::vector<TensorObject>&>(caster)) {
        views.push_back(view_of(argument, tensor.object));
      }
      return views;
    } else {
      return pybind11::detail::cast_op<Given>(std::move(caster));
    }
  }
}

// Sorts the values of a call by `keywords`. Python itself sees to it that none is given twice.
template <size_t count>
std::array<PyObject*, count> by_keyword(const char* op, const std::array<PyObject*, count>& keywords,
                                        PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  const auto refuse = [op](const std::string& problem) { throw pybind11::type_error(op + (": " + problem)); };
  if (positional != 0) refuse("takes keyword arguments alone");
  std::array<PyObject*, count> sorted{};
  const Py_ssize_t given = names ? PyTuple_GET_SIZE(names) : 0;
  for (Py_ssize_t i = 0; i < given; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    size_t k = i, tried = 0;
    const auto next = [&] { k = k + 1 < count ? k + 1 : 0, ++tried; };
    for (k %= count; tried < count && keywords[k] != name; next()) {}
    if (tried == count) {  // a name that was made at run time
      for (tried = 0; tried < count && PyUnicode_Compare(keywords[k], name) != 0; next()) {}
    }
    if (tried == count) refuse("has no argument " + pybind11::handle(name).cast<std::string>());
    sorted[k] = values[i];
  }
  for (size_t k = 0; k < count; ++k) {
    if (!sorted[k]) refuse("argument " + pybind11::handle(keywords[k]).cast<std::string>() + " is missing");
  }
  return sorted;
}

// What the function's `self` points to; lives as long as the process.
template <class Params, class Before, class Run>
struct Function {
  static constexpr auto fields = Params::fields();
  static constexpr size_t count = std::tuple_size_v<decltype(fields)>;

  const char* name;
  dlpack::DeviceType device;
  Before before;
  Run run;
  std::string doc{};
  std::array<PyObject*, count> keywords{};
  PyMethodDef definition{};

  void call(PyObject* const* values, Py_ssize_t positional, PyObject* names) const {
    const auto sorted = by_keyword(name, keywords, values, positional, names);
    Params params;
    size_t k = 0;
    std::apply(
        [&]<class... Owner, class... T>(const ops::Field<Owner, T>&... field) {  // an Owner: Params, or what it extends
          ((params.*(field.member) = taken<T>({name, field.name, device}, sorted[k++])), ...);
        },
        fields);
    before();
    const pybind11::gil_scoped_release unlocked;
    validate(params);
    run(params);
  }

  static PyObject* enter(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
      static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr))->call(values, positional, names);
    } catch (...) {
      pybind11::detail::try_translate_exceptions();
      return nullptr;
    }
    Py_RETURN_NONE;
  }

  void add_to(pybind11::module_& module) {
    size_t k = 0;
    std::apply(
        [&]<class... Owner, class... T>(const ops::Field<Owner, T>&... field) {
          ((keywords[k++] = PyUnicode_InternFromString(field.name),
            doc += std::string(", ") + field.name + ": " + python_type<T>()),
           ...);
        },
        fields);
    doc = name + ("(*" + doc) + ") -> None";
    const auto entry = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&enter));
    definition = {name, entry, METH_FASTCALL | METH_KEYWORDS, doc.c_str()};
    const auto self = pybind11::reinterpret_steal<pybind11::object>(PyCapsule_New(this, nullptr, nullptr));
    const pybind11::object home = module.attr("__name__");
    module.add_object(
        name, pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&definition, self.ptr(), home.ptr())));
  }
};

// `before()` runs with the interpreter locked; validate() and `run(params)` follow with it released. Tensors must lie
// on `device`.
template <class Params, class Before, class Run>
void bind(pybind11::module_& module, const char* name, dlpack::DeviceType device, Before before, Run run) {
  (new Function<Params, Before, Run>{name, device, before, run})->add_to(module);
}

}  // namespace llmengine
