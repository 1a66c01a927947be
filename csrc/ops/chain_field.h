// A linear-chain conditional random field over K tags (Lafferty et al. 2001) on packed sequences of n tokens.
//
//   score(y) = start[y_0] + sum_t emissions[t, y_t] + sum_t transition[y_t-1, y_t] + end[y_n-1]
//   loss = log Z - score(tags),  Z = sum over all K^n sequences y of exp(score(y));  0 for a sequence without tokens
//
//   forward algorithm: A_0 = start + emissions[0],  A_t[j] = emissions[t, j] + log sum_i exp(A_t-1[i] + transition[i,
//   j])
//     log Z = log sum_j exp(A_n-1[j] + end[j]);  alpha[t] = A_t less its largest element (as it is where all are -inf)
//   backward, with B_n-1 = end,  B_t[i] = log sum_j exp(transition[i, j] + emissions[t + 1, j] + B_t+1[j]):
//     marginal[t, j] = exp(A_t[j] + B_t[j] - log Z)
//     pair[t, i, j] = exp(A_t-1[i] + transition[i, j] + emissions[t, j] + B_t[j] - log Z)
//     d emissions[t, j] = g (marginal[t, j] - [j = tags_t]),  g = grad_losses of the sequence
//     d transition[i, j] = sum of g (pair[t, i, j] - [i = tags_t-1][j = tags_t])
//     d start, d end: the sums of d emissions over first and over last tokens
//   decoding (Viterbi 1967): the y of the largest score, computed in float in this order:
//     V_0 = start + emissions[0],  V_t[j] = max_i (V_t-1[i] + transition[i, j]) + emissions[t, j],  V_n-1[j] + end[j];
//     the lowest index where several are largest, so that all backends agree to the last bit
//
//   -inf, what cannot be: its probability and gradient are 0. Tags that cannot be have the loss +inf, and the gradient
//   as above; where no sequence can be all marginals are 0, the decoded score is -inf and the tags are -1. NaN and +inf
//   are no scores: a sequence that they reach has the loss or score NaN, and tags -1. Tokens past the last boundary
//   belong to no sequence: their gradient is 0, their tag -1.
#pragma once

#include <limits>
#include <string>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/boundaries.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct ChainField {
  TensorView emissions;   // (tokens, K), unit last stride
  TensorView transition;  // float32 (K, K), [from, to]
  TensorView start, end;  // float32 (K,)
  TensorView cu_seqlens;  // int32 (sequences + 1,)

  static constexpr auto fields() {
    using P = ChainField;
    return std::tuple{field("emissions", &P::emissions), field("transition", &P::transition), field("start", &P::start),
                      field("end", &P::end), field("cu_seqlens", &P::cu_seqlens)};
  }

  int64_t tokens() const { return emissions.size(0); }
  int64_t tag_count() const { return emissions.size(1); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }
};

struct ChainFieldForward : ChainField {
  TensorView tags;    // int64 (tokens,)
  TensorView losses;  // float32 (sequences,)
  TensorView alpha;   // float32 (tokens, K)

  static constexpr auto fields() {
    using P = ChainFieldForward;
    return std::tuple_cat(ChainField::fields(),
                          std::tuple{field("tags", &P::tags), field("losses", &P::losses), field("alpha", &P::alpha)});
  }
};

struct ChainFieldBackward : ChainField {
  TensorView grad_losses;           // float32 (sequences,), any stride
  TensorView tags;                  // as ChainFieldForward's
  TensorView alpha;                 // as ChainFieldForward's
  TensorView grad_emissions;        // like emissions, contiguous
  TensorView grad_transition;       // float32 (K, K)
  TensorView grad_start, grad_end;  // float32 (K,)

  static constexpr auto fields() {
    using P = ChainFieldBackward;
    return std::tuple_cat(
        ChainField::fields(),
        std::tuple{field("grad_losses", &P::grad_losses), field("tags", &P::tags), field("alpha", &P::alpha),
                   field("grad_emissions", &P::grad_emissions), field("grad_transition", &P::grad_transition),
                   field("grad_start", &P::grad_start), field("grad_end", &P::grad_end)});
  }
};

struct ChainFieldDecode : ChainField {
  TensorView tags;    // int64 (tokens,)
  TensorView scores;  // float32 (sequences,)

  static constexpr auto fields() {
    using P = ChainFieldDecode;
    return std::tuple_cat(ChainField::fields(), std::tuple{field("tags", &P::tags), field("scores", &P::scores)});
  }
};

inline void validate_array(const Checker& at, const TensorView& t, const char* argument, DType dtype,
                           std::initializer_list<int64_t> shape) {
  at.defined(t, argument);
  at.dtype(t, argument, {dtype});
  at.shape(t, argument, shape);
  at.contiguous(t, argument);
}

inline void validate_field(const Checker& at, const ChainField& p) {
  at.defined(p.emissions, "emissions");
  at.dtype(p.emissions, "emissions", {DType::f32, DType::bf16});
  if (p.emissions.ndim != 2 || p.tag_count() < 1) {
    at.fail_at("emissions", "must be (tokens, K) with at least one tag, got " + p.emissions.shape());
  }
  at.unit_last_stride(p.emissions, "emissions");
  validate_array(at, p.transition, "transition", DType::f32, {p.tag_count(), p.tag_count()});
  validate_array(at, p.start, "start", DType::f32, {p.tag_count()});
  validate_array(at, p.end, "end", DType::f32, {p.tag_count()});
  at.defined(p.cu_seqlens, "cu_seqlens");
  if (p.cu_seqlens.ndim != 1 || p.cu_seqlens.size(0) < 1) {
    at.fail_at("cu_seqlens", "must be (sequences + 1,), got " + p.cu_seqlens.shape());
  }
  validate_array(at, p.cu_seqlens, "cu_seqlens", DType::i32, {p.cu_seqlens.size(0)});
}

inline void validate(const ChainFieldForward& p) {
  const Checker at{"chain_field"};
  validate_field(at, p);
  validate_array(at, p.tags, "tags", DType::i64, {p.tokens()});
  validate_array(at, p.losses, "losses", DType::f32, {p.sequences()});
  validate_array(at, p.alpha, "alpha", DType::f32, {p.tokens(), p.tag_count()});
}

inline void validate(const ChainFieldBackward& p) {
  const Checker at{"chain_field backward"};
  validate_field(at, p);
  at.defined(p.grad_losses, "grad_losses");
  at.dtype(p.grad_losses, "grad_losses", {DType::f32});
  at.shape(p.grad_losses, "grad_losses", {p.sequences()});
  validate_array(at, p.tags, "tags", DType::i64, {p.tokens()});
  validate_array(at, p.alpha, "alpha", DType::f32, {p.tokens(), p.tag_count()});
  validate_array(at, p.grad_emissions, "grad_emissions", p.emissions.dtype, {p.tokens(), p.tag_count()});
  validate_array(at, p.grad_transition, "grad_transition", DType::f32, {p.tag_count(), p.tag_count()});
  validate_array(at, p.grad_start, "grad_start", DType::f32, {p.tag_count()});
  validate_array(at, p.grad_end, "grad_end", DType::f32, {p.tag_count()});
}

inline void validate(const ChainFieldDecode& p) {
  const Checker at{"chain_field decoding"};
  validate_field(at, p);
  validate_array(at, p.tags, "tags", DType::i64, {p.tokens()});
  validate_array(at, p.scores, "scores", DType::f32, {p.sequences()});
}

// Reads the boundaries, and the tags within them: an error (ValueError in Python) where they do not fit.
inline void check_sequences(const char* op, const ChainField& p, const TensorView* tags) {
  check_boundaries(Checker{op}, p.cu_seqlens, "cu_seqlens", p.tokens(), std::numeric_limits<int32_t>::max());
  const int64_t inside = p.cu_seqlens.as<int32_t>()[p.sequences()];
  for (int64_t t = 0; tags && t < inside; ++t) {
    const int64_t tag = tags->as<int64_t>()[t];
    if (tag >= 0 && tag < p.tag_count()) continue;
    fail(std::string(op) + ": tags has " + std::to_string(tag) + " at token " + std::to_string(t) + "; allowed: 0 to " +
         std::to_string(p.tag_count() - 1) + " (" + std::to_string(p.tag_count()) + " tags)");
  }
}

}  // namespace llmengine::ops
