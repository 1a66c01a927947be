// Makes a Python function of an operator: its keyword arguments are the fields of the operator's Params struct.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/caster.h"
#include "ops/fields.h"

namespace llmengine {

// What Python gives for a field: tensors as objects, which become views under the name of their argument.
using TensorList = std::vector<TensorView>;
template <class T>
using Given = std::conditional_t<std::is_same_v<T, TensorView>, TensorObject,
                                 std::conditional_t<std::is_same_v<T, TensorList>, std::vector<TensorObject>, T>>;

template <class T>
T taken(const Argument& argument, Given<T>&& value) {
  if constexpr (std::is_same_v<T, TensorView>) {
    return view_of(argument, value.object);
  } else if constexpr (std::is_same_v<T, TensorList>) {
    TensorList views;
    views.reserve(value.size());
    for (const TensorObject& tensor : value) views.push_back(view_of(argument, tensor.object));
    return views;
  } else {
    return std::move(value);
  }
}

// `before()` runs with the interpreter locked; validate() and `run(params)` follow with it released. Tensors must lie
// on `device`.
template <class Params, class Before, class Run>
void bind(pybind11::module_& module, const char* name, dlpack::DeviceType device, Before before, Run run) {
  std::apply(
      [&]<class... Owner, class... T>(ops::Field<Owner, T>... field) {  // an Owner: Params, or what it extends
        module.def(
            name,
            [=](Given<T>... value) {
              Params params;
              ((params.*(field.member) = taken<T>({name, field.name, device}, std::move(value))), ...);
              before();
              pybind11::gil_scoped_release unlocked;
              validate(params);
              run(params);
            },
            pybind11::kw_only(), pybind11::arg(field.name)...);
      },
      Params::fields());
}

}  // namespace llmengine
