// The operators of csrc/cuda/, for both modules that have them: _cuda on devices, _cuda_sim in the simulator.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/bind.h"
#include "cuda/adamw.h"
#include "cuda/attention.h"
#include "cuda/attention_fp8.h"
#include "cuda/attention_sm90a.h"
#include "cuda/compiled.h"
#include "cuda/cross_entropy.h"
#include "cuda/decode_attention.h"
#include "cuda/embedding.h"
#include "cuda/ffn.h"
#include "cuda/fp8.h"
#include "cuda/gemm.h"
#include "cuda/gemm_cores.h"
#include "cuda/gradient_norm.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/norm.h"
#include "cuda/rotary.h"
#include "cuda/softmax.h"
#include "cuda/tensor_map.h"

namespace llmengine {

// An operator's arguments and the stream that it runs on: there is no default stream, so none is taken by mistake.
template <class Params>
struct OnStream : Params {
  int64_t stream = 0;

  static constexpr auto fields() {
    return std::tuple_cat(Params::fields(), std::tuple{ops::field("stream", &OnStream::stream)});
  }
};

// compile(source, kernel, capability) -> (name, image) or None; kept for ever, as the module is.
inline void set_compiler(pybind11::function compile) {
  cuda::set_compiler([kept = compile.release()](const cuda::Instance& instance, int capability) {
    const pybind11::gil_scoped_acquire locked;
    const pybind11::object code = kept(instance.source, instance.kernel, capability);
    if (code.is_none()) return std::optional<cuda::MachineCode>();
    auto [name, image] = code.cast<std::pair<std::string, std::string>>();
    return std::optional(cuda::MachineCode{std::move(name), std::move(image)});
  });
}

// `around(params, launch)` calls launch(params), with whatever the module's device needs before and after.
template <class Around>
void bind_cuda_operators(pybind11::module_& module, dlpack::DeviceType device, Around around) {
  const auto operation = [&]<class Params>(const char* name, Params) {
    bind<OnStream<Params>>(
        module, name, device, [] {},
        [=](const OnStream<Params>& params) {
          around(params, [](const OnStream<Params>& given) { cuda::run(given, cuda::Stream{given.stream}); });
        });
  };
  operation("adamw", cuda::AdamW{});
  operation("attention_forward", cuda::AttentionForward{});
  operation("attention_forward_sm90a", cuda::AttentionForwardSm90a{});
  operation("attention_backward", cuda::AttentionBackward{});
  operation("attention_backward_sm90a", cuda::AttentionBackwardSm90a{});
  operation("attention_backward_one_pass", cuda::AttentionBackwardOnePass{});
  operation("attention_fp8_forward", cuda::AttentionFp8Forward{});
  operation("attention_fp8_quantise", cuda::AttentionFp8Quantise{});
  operation("column_sums", cuda::ColumnSums{});
  operation("cross_entropy_forward", cuda::CrossEntropyForward{});
  operation("cross_entropy_backward", cuda::CrossEntropyBackward{});
  operation("decode_attention", cuda::DecodeAttention{});
  operation("embedding_forward", cuda::EmbeddingForward{});
  operation("embedding_backward", cuda::EmbeddingBackward{});
  operation("ffn_backward", cuda::FeedForwardBackward{});
  operation("ffn_forward", cuda::FeedForwardForward{});
  operation("ffn_hidden_forward", cuda::HiddenForward{});
  operation("ffn_hidden_backward", cuda::HiddenBackward{});
  operation("fp8_product", cuda::Fp8Product{});
  operation("fp8_quantise", cuda::Fp8Quantise{});
  operation("gemm", cuda::Gemm{});
  operation("gradient_norm", cuda::GradientNorm{});
  operation("linear_cross_entropy_forward", cuda::LinearCrossEntropyForward{});
  operation("linear_cross_entropy_backward", cuda::LinearCrossEntropyBackward{});
  operation("linear_cross_entropy_shard_forward", cuda::LinearCrossEntropyShardForward{});
  operation("linear_cross_entropy_shard_backward", cuda::LinearCrossEntropyShardBackward{});
  operation("norm_forward", cuda::NormForward{});
  operation("norm_backward", cuda::NormBackward{});
  operation("rotary_forward", cuda::RotaryForward{});
  operation("rotary_backward", cuda::RotaryBackward{});
  operation("softmax_forward", cuda::SoftmaxForward{});
  operation("softmax_backward", cuda::SoftmaxBackward{});
  module.def("set_compiler", &set_compiler, pybind11::arg("compile"));
  module.def("take_launched", &cuda::take_launched);
  module.def("take_left", &cuda::take_left);
  module.def(
      "tensor_map_refuses",
      [=](TensorObject tensor) {
        return tensor_map_refuses(view_of({"tensor_map_refuses", "tensor", device}, tensor.object));
      },
      pybind11::kw_only(), pybind11::arg("tensor"));
  module.def(
      "norm_backward_blocks",
      [=](TensorObject h) { return cuda::norm_backward_blocks(view_of({"norm backward", "h", device}, h.object)); },
      pybind11::kw_only(), pybind11::arg("h"));
}

}  // namespace llmengine
