// llmengine._cpu: the CPU kernels.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/adamw.h"
#include "ops/attention.h"
#include "ops/chain_field.h"
#include "ops/cross_entropy.h"
#include "ops/decode_attention.h"
#include "ops/embedding.h"
#include "ops/ffn.h"
#include "ops/gradient_norm.h"
#include "ops/linear.h"
#include "ops/linear_cross_entropy.h"
#include "ops/multiply_add_peak.h"
#include "ops/norm.h"
#include "ops/relative_attention.h"
#include "ops/rotary.h"
#include "ops/softmax.h"

namespace py = pybind11;

namespace llmengine {
namespace {

// torch.get_num_threads, given by the Python side at import; asked at every call, since users change it at will.
py::object& thread_count() {
  static auto* source = new py::object();  // never destroyed: the interpreter may be gone by then
  return *source;
}

template <class Params>
void bind_cpu(py::module_& module, const char* name) {
  bind<Params>(
      module, name, dlpack::kCPU, [] { cpu::set_num_threads(thread_count() ? thread_count()().cast<int>() : 1); },
      [](const Params& params) { cpu::run(params); });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.def("set_thread_count_source", [](py::object source) { thread_count() = std::move(source); });
  module.def("isa", [] { return std::string(cpu::name(cpu::active_isa())); });
  module.def("isa_notice", &cpu::isa_notice);
  module.def("supported_isas", [] {
    py::list names;
    for (int i = 0; i < cpu::kIsaCount; ++i) {
      if (cpu::supported(static_cast<cpu::Isa>(i))) names.append(cpu::name(static_cast<cpu::Isa>(i)));
    }
    return names;
  });

  bind_cpu<ops::AdamW>(module, "adamw");
  bind_cpu<ops::AttentionForward>(module, "attention_forward");
  bind_cpu<ops::AttentionBackward>(module, "attention_backward");
  bind_cpu<ops::ChainFieldForward>(module, "chain_field_forward");
  bind_cpu<ops::ChainFieldBackward>(module, "chain_field_backward");
  bind_cpu<ops::ChainFieldDecode>(module, "chain_field_decode");
  bind_cpu<ops::CrossEntropyForward>(module, "cross_entropy_forward");
  bind_cpu<ops::CrossEntropyBackward>(module, "cross_entropy_backward");
  bind_cpu<ops::DecodeAttention>(module, "decode_attention");
  bind_cpu<ops::EmbeddingForward>(module, "embedding_forward");
  bind_cpu<ops::EmbeddingBackward>(module, "embedding_backward");
  bind_cpu<ops::FeedForwardForward>(module, "ffn_forward");
  bind_cpu<ops::FeedForwardBackward>(module, "ffn_backward");
  bind_cpu<ops::GradientNorm>(module, "gradient_norm");
  bind_cpu<ops::LinearForward>(module, "linear_forward");
  bind_cpu<ops::LinearBackward>(module, "linear_backward");
  bind_cpu<ops::LinearCrossEntropyForward>(module, "linear_cross_entropy_forward");
  bind_cpu<ops::LinearCrossEntropyBackward>(module, "linear_cross_entropy_backward");
  bind_cpu<ops::LinearCrossEntropyWithGradients>(module, "linear_cross_entropy_with_gradients");
  bind_cpu<ops::LinearCrossEntropyShardForward<ops::LinearCrossEntropyForward>>(module,
                                                                                "linear_cross_entropy_shard_forward");
  bind_cpu<ops::LinearCrossEntropyShardBackward<ops::LinearCrossEntropyBackward>>(
      module, "linear_cross_entropy_shard_backward");
  bind_cpu<ops::MultiplyAddPeak>(module, "multiply_add_peak");
  bind_cpu<ops::NormForward>(module, "norm_forward");
  bind_cpu<ops::NormBackward>(module, "norm_backward");
  bind_cpu<ops::RelativeAttentionForward>(module, "relative_attention_forward");
  bind_cpu<ops::RelativeAttentionBackward>(module, "relative_attention_backward");
  bind_cpu<ops::RotaryForward>(module, "rotary_forward");
  bind_cpu<ops::RotaryBackward>(module, "rotary_backward");
  bind_cpu<ops::SoftmaxForward>(module, "softmax_forward");
  bind_cpu<ops::SoftmaxBackward>(module, "softmax_backward");
}

}  // namespace llmengine
