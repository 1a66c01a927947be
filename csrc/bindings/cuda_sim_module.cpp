// llmengine._cuda_sim: the CUDA kernels, run on CPU tensors by the simulator (csrc/sim/). For tests.
#include <type_traits>
#include <vector>

#include "bindings/cuda_operators.h"
#include "sim/simulator.h"

namespace llmengine {
namespace {

// Every tensor of the call, by the name of its argument: kernels may touch these.
template <class Params>
std::vector<sim::NamedView> tensors_of(const Params& params) {
  std::vector<sim::NamedView> tensors;
  const auto add = [&](const auto& field) {
    const auto& value = params.*(field.member);
    using Value = std::remove_cvref_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, TensorView>) {
      if (value.defined()) tensors.push_back({field.name, value});
    } else if constexpr (std::is_same_v<Value, TensorList>) {
      for (const TensorView& tensor : value) tensors.push_back({field.name, tensor});
    }
  };
  std::apply([&](const auto&... field) { (add(field), ...); }, Params::fields());
  return tensors;
}

}  // namespace

PYBIND11_MODULE(_cuda_sim, module) {
  module.def("set_schedule", &sim::set_schedule, pybind11::arg("order"), pybind11::arg("seed") = 0);
  bind_cuda_operators(module, dlpack::kCPU, [](const auto& params, const auto& launch) {
    const sim::Tensors touchable(tensors_of(params));
    launch();
  });
}

}  // namespace llmengine
