// Attention over a cache (ops/decode_attention.h) on CUDA, of bfloat16 and float16: decode_attention.cu, on every GPU
// from sm_80 on.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/decode_attention.h"

namespace llmengine::cuda {

struct DecodeAttention : ops::DecodeAttention {
  // Room for what `splits` blocks leave of each row, value_dim rounded up to 8; or none, where one block does all.
  TensorView partial_sums;        // float32 (splits, batch, heads, rows, value_dim)
  TensorView partial_statistics;  // float32 (splits, batch, heads, rows, 2)

  static constexpr auto fields() {
    using P = DecodeAttention;
    return std::tuple_cat(ops::DecodeAttention::fields(),
                          std::tuple{ops::field("partial_sums", &P::partial_sums),
                                     ops::field("partial_statistics", &P::partial_statistics)});
  }

  int64_t splits() const { return partial_sums.defined() ? partial_sums.size(0) : 1; }
};

void validate(const DecodeAttention& p);
void run(const DecodeAttention& p, Stream stream);

}  // namespace llmengine::cuda
