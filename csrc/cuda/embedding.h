// What the CUDA backend adds to the contract of ops/embedding.h: float16, and for the backward the tokens in the order
// of their ids, so that the sums have a fixed order without atomics. An id that is no row of the table gives NaN, and
// no gradient: nothing waits to say so.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "ops/embedding.h"

namespace llmengine::cuda {

struct EmbeddingForward : ops::EmbeddingForward {};

inline constexpr int kEmbeddingChunk = 16;  // tokens that a warp adds up

struct EmbeddingBackward {
  TensorView grad_output;  // (tokens, columns), unit last stride
  TensorView ids, tokens;  // int32, int64 (tokens,): the ids in ascending order, and whose they are
  TensorView partial;      // float32 (chunks of kEmbeddingChunk tokens, 2, columns): sums that go on in another chunk
  int64_t padding_idx = -1;
  double scale = 1.0;
  TensorView grad_weight;  // (rows, columns), contiguous, zeros: rows without tokens stay as they are

  static constexpr auto fields() {
    using P = EmbeddingBackward;
    return std::tuple{ops::field("grad_output", &P::grad_output), ops::field("ids", &P::ids),
                      ops::field("tokens", &P::tokens),           ops::field("partial", &P::partial),
                      ops::field("padding_idx", &P::padding_idx), ops::field("scale", &P::scale),
                      ops::field("grad_weight", &P::grad_weight)};
  }
};

void validate(const EmbeddingForward& p);
void validate(const EmbeddingBackward& p);
void run(const EmbeddingForward& p, Stream stream);
void run(const EmbeddingBackward& p, Stream stream);

}  // namespace llmengine::cuda
