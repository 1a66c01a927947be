// What the CUDA backend adds to the contract of ops/cross_entropy.h: float16, the sum of the class weights, a stream.
// A target that is no class makes the loss and the gradient of its row NaN: nothing waits to say so.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/cross_entropy.h"

namespace llmengine::cuda {

struct CrossEntropyForward : ops::CrossEntropyForward {
  TensorView weight_sum;  // float32 (): of weight; needed with label smoothing

  static constexpr auto fields() {
    return std::tuple_cat(ops::CrossEntropyForward::fields(),
                          std::tuple{ops::field("weight_sum", &CrossEntropyForward::weight_sum)});
  }
};

struct CrossEntropyBackward : ops::CrossEntropyBackward {
  TensorView weight_sum;

  static constexpr auto fields() {
    return std::tuple_cat(ops::CrossEntropyBackward::fields(),
                          std::tuple{ops::field("weight_sum", &CrossEntropyBackward::weight_sum)});
  }
};

// The losses of all tokens: their sum or mean into `loss`, which is not looked at for "none", and p.normaliser.
void add_losses(const ops::CrossEntropyOptions& p, const TensorView& losses, const TensorView& loss, int classes,
                Stream stream);

void validate(const CrossEntropyForward& p);
void validate(const CrossEntropyBackward& p);
void run(const CrossEntropyForward& p, Stream stream);
void run(const CrossEntropyBackward& p, Stream stream);

}  // namespace llmengine::cuda
