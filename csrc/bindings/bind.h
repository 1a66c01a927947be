// Makes a Python function of an operator: its keyword arguments are the fields of the operator's Params struct.
#pragma once

#include <pybind11/pybind11.h>

#include <tuple>
#include <utility>

#include "bindings/caster.h"

namespace llmengine {

// `before()` runs with the interpreter locked; validate() and `run(params)` follow with it released.
template <class Params, class Before, class Run>
void bind(pybind11::module_& module, const char* name, Before before, Run run) {
  std::apply(
      [&]<class... Field>(Field... field) {
        module.def(
            name,
            [=](std::remove_cvref_t<decltype(std::declval<Params>().*(field.member))>... value) {
              Params params;
              ((params.*(field.member) = std::move(value)), ...);
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
