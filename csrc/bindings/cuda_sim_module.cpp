// llmengine._cuda_sim: the CUDA kernels, run on CPU tensors by the simulator (csrc/sim/). For tests.
#include <type_traits>
#include <vector>

#include "bindings/cuda_operators.h"
#include "sim/apart.h"
#include "sim/simulator.h"

namespace llmengine {
namespace {

// Calls visit(name, tensor) for every tensor of the call: kernels may touch these.
template <class Params, class Visit>
void visit_tensors(Params& params, const Visit& visit) {
  const auto visit_field = [&](const auto& field) {
    auto& value = params.*(field.member);
    using Value = std::remove_cvref_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, TensorView>) {
      if (value.defined()) visit(field.name, value);
    } else if constexpr (std::is_same_v<Value, TensorList>) {
      for (auto& tensor : value) visit(field.name, tensor);
    }
  };
  std::apply([&](const auto&... field) { (visit_field(field), ...); }, Params::fields());
}

// Runs on copies of the tensors that lie far apart, under the names of the arguments.
template <class Params, class Launch>
void run_apart(Params params, const Launch& launch) {
  std::vector<TensorView*> tensors;
  visit_tensors(params, [&](const char*, TensorView& tensor) { tensors.push_back(&tensor); });
  const sim::Apart apart(tensors);
  std::vector<sim::NamedView> named;
  visit_tensors(params, [&](const char* name, const TensorView& tensor) { named.push_back({name, tensor}); });
  const sim::Tensors touchable(named);
  launch(params);
  apart.give_back();
}

}  // namespace

PYBIND11_MODULE(_cuda_sim, module) {
  module.def("set_schedule", &sim::set_schedule, pybind11::arg("order"), pybind11::arg("seed") = 0);
  module.def("set_multiprocessors", [](int count) { sim::multiprocessors = count; }, pybind11::arg("count"));
  module.def("last_stream", [] { return reinterpret_cast<uintptr_t>(sim::last_stream); });
  module.def("problem_of_capability", &cuda::problem_of_capability);
  // (kernel, tensor, reads, bytes read, writes, bytes written) of the latest call's launches
  module.def("moved", [] {
    pybind11::list result;
    for (const sim::Moved& m : sim::moved()) {
      result.append(
          pybind11::make_tuple(sim::name_of(m.kernel), m.tensor, m.reads, m.bytes_read, m.writes, m.bytes_written));
    }
    return result;
  });
  bind_cuda_operators(module, dlpack::kCPU, [](const auto& params, const auto& launch) { run_apart(params, launch); });
}

}  // namespace llmengine
