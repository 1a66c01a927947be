// What the CUDA backend adds to the contract of ops/adamw.h: float16, a learning rate that the host knows, room for
// what the step makes of its numbers, a stream.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/adamw.h"

namespace llmengine::cuda {

// Parameters and moments are float32, bfloat16 or float16; moments float16 only where parameters are.
struct AdamW : ops::AdamW {
  double rate = 0;     // the learning rate where lr is none
  TensorView factors;  // int64 (parameters, 4)

  static constexpr auto fields() {
    return std::tuple_cat(ops::AdamW::fields(),
                          std::tuple{ops::field("rate", &AdamW::rate), ops::field("factors", &AdamW::factors)});
  }
};

void validate(const AdamW& p);
void run(const AdamW& p, Stream stream);

}  // namespace llmengine::cuda
