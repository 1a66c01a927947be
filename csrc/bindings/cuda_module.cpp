// llmengine._cuda: the CUDA kernels.
#include "bindings/cuda_operators.h"

namespace llmengine {

PYBIND11_MODULE(_cuda, module) {
  module.def("device_problem", &cuda::device_problem);
  module.def("sources", &cuda::sources);
  bind_cuda_operators(module, dlpack::kCUDA, [](const auto& params, const auto& launch) { launch(params); });
}

}  // namespace llmengine
