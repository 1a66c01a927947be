// Attention, softmax(logits) value, of padded batches and of packed sequences (Vaswani et al. 2017; computed in tiles
// with an online softmax, so that no (rows, keys) matrix is held: Dao et al. 2022).
//
//   u = scale query key^T
//   logits = cap(u) - slope |key - p| + bias(key - p) + mask, -inf where the key is not seen;
//            cap(u) = softcap tanh(u / softcap)    (p, and the keys a row sees: ops/attention_band.h)
//            bias(d) = distance_bias[head, clamp(d, -M, M) + M]: distances beyond M share the end entries
//   lse = log (exp(sinks[head]) + sum_keys exp(logits)),  P = exp(logits - lse)    (no sinks: exp(-inf))
//   output = (P keep / (1 - dropout_p)) value
//   A row that sees no key: output 0, lse -inf, or the sink's logit, and no gradients of query, key and value.
//   lse_low is what rounding took from lse (0 where lse is infinite): with |lse| in the hundreds, float32 lse alone
//   would make every P of a row wrong by 1e-5. Where a bias is larger than all else, lse_low is the sum's logarithm.
//
//   backward, with Z = keep / (1 - dropout_p) and delta = rowsum(grad_output output) - grad_lse:
//     grad_value = (P Z)^T grad_output
//     grad_logits = P ((grad_output value^T) Z - delta) = grad_mask, summed over what the mask was broadcast along
//     grad_distance_bias[head, m] = sum of grad_logits over the scores, of all sequences, that entry m was added to
//     grad_sinks[head] = - sum over rows of exp(sinks[head] - lse) delta: a sink is a key that every row of a sequence
//                        sees, whose value is 0
//     grad_u = grad_logits cap'(u),  grad_query = scale grad_u key,  grad_key = scale grad_u^T query
//
//   Dropout draws (ops/philox.h): stream = sequence x heads + head, row and column counted within the sequence.
//   Query heads [g group, (g + 1) group) share key head g.
#pragma once

#include <cmath>
#include <initializer_list>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/attention_band.h"
#include "ops/boundaries.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct AttentionOptions {
  TensorView query;                       // (batch, heads, rows, head_dim), unit last stride like all operands
  TensorView key, value;                  // (batch, key heads, keys, head_dim or value_dim)
  TensorView mask;                        // (1|batch, 1|heads, 1|rows, 1|keys), bool (true: seen) or float, or none
  TensorView alibi_slopes;                // float32 (sequences, heads), or none
  TensorView distance_bias;               // float32 (heads, 2 M + 1), or none
  TensorView sinks;                       // float32 (heads,), or none
  TensorView cu_seqlens_q, cu_seqlens_k;  // int32 (sequences + 1,): batch is 1 and rows and keys are cut; or none
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  TensorView seed;  // int64 (1,), where dropout_p > 0
  int64_t window_left = -1, window_right = -1;
  bool bottom_right = false;
  double scale = 1.0, softcap = 0.0, dropout_p = 0.0;

  static constexpr auto fields() {
    using P = AttentionOptions;
    return std::tuple{field("query", &P::query),
                      field("key", &P::key),
                      field("value", &P::value),
                      field("mask", &P::mask),
                      field("alibi_slopes", &P::alibi_slopes),
                      field("distance_bias", &P::distance_bias),
                      field("sinks", &P::sinks),
                      field("cu_seqlens_q", &P::cu_seqlens_q),
                      field("cu_seqlens_k", &P::cu_seqlens_k),
                      field("max_seqlen_q", &P::max_seqlen_q),
                      field("max_seqlen_k", &P::max_seqlen_k),
                      field("seed", &P::seed),
                      field("window_left", &P::window_left),
                      field("window_right", &P::window_right),
                      field("bottom_right", &P::bottom_right),
                      field("scale", &P::scale),
                      field("softcap", &P::softcap),
                      field("dropout_p", &P::dropout_p)};
  }

  int64_t heads() const { return query.size(1); }
  int64_t key_heads() const { return key.size(1); }
  int64_t group() const { return key_heads() ? heads() / key_heads() : 1; }
  bool packed() const { return cu_seqlens_q.defined(); }
  int64_t sequences() const { return packed() ? cu_seqlens_q.size(0) - 1 : query.size(0); }
  int64_t farthest() const { return distance_bias.size(1) / 2; }  // M
  // The logit that takes part in each row's softmax beside its keys' (of tokens outside all sequences: in none).
  float sink(const Sequence& s, int64_t head) const {
    return sinks.defined() && s.index < sequences() ? sinks.as<float>()[head] : -INFINITY;
  }
  Band band(const Sequence& s) const { return {s.rows, s.keys, window_left, window_right, bottom_right}; }
};

struct AttentionForward : AttentionOptions {
  TensorView output;  // like query, with value_dim
  TensorView lse;     // float32 (batch, heads, rows)
  TensorView lse_low;

  static constexpr auto fields() {
    using P = AttentionForward;
    return std::tuple_cat(AttentionOptions::fields(), std::tuple{field("output", &P::output), field("lse", &P::lse),
                                                                 field("lse_low", &P::lse_low)});
  }
};

struct AttentionBackward : AttentionOptions {
  TensorView grad_output;  // like output
  TensorView grad_lse;     // like lse, or none
  TensorView output, lse, lse_low;
  TensorView grad_query, grad_key, grad_value;  // like query, key, value
  TensorView grad_mask;                         // float32, like mask; or none
  TensorView grad_distance_bias;                // float32, like distance_bias; or none
  TensorView grad_sinks;                        // float32, like sinks; or none

  static constexpr auto fields() {
    using P = AttentionBackward;
    return std::tuple_cat(
        AttentionOptions::fields(),
        std::tuple{field("grad_output", &P::grad_output), field("grad_lse", &P::grad_lse), field("output", &P::output),
                   field("lse", &P::lse), field("lse_low", &P::lse_low), field("grad_query", &P::grad_query),
                   field("grad_key", &P::grad_key), field("grad_value", &P::grad_value),
                   field("grad_mask", &P::grad_mask), field("grad_distance_bias", &P::grad_distance_bias),
                   field("grad_sinks", &P::grad_sinks)});
  }
};

// What operands and masks may be: a CPU's kernels take no float16, and not all of a GPU's take float32.
struct AttentionTypes {
  std::initializer_list<DType> operands, masks;
};
inline constexpr std::initializer_list<DType> kAttentionOperands = {DType::f32, DType::bf16};
inline constexpr std::initializer_list<DType> kAttentionMasks = {DType::boolean, DType::f32, DType::bf16};
inline constexpr AttentionTypes kAttentionTypes = {kAttentionOperands, kAttentionMasks};

inline void check_operands(const Checker& at, const AttentionOptions& p, std::initializer_list<DType> types) {
  for (auto [t, argument] : NamedTensors{{&p.query, "query"}, {&p.key, "key"}, {&p.value, "value"}}) {
    at.defined(*t, argument);
    at.dtype(*t, argument, types);
    at.dtype(*t, argument, {p.query.dtype});
    if (t->ndim != 4) at.fail_at(argument, "must be (batch, heads, tokens, head_dim), got " + t->shape());
    at.unit_last_stride(*t, argument);
  }
  const int64_t batch = p.query.size(0), keys = p.key.size(2);
  at.shape(p.key, "key", {batch, p.key_heads(), keys, p.query.size(3)});
  at.shape(p.value, "value", {batch, p.key_heads(), keys, p.value.size(3)});
  if (p.key_heads() ? p.heads() % p.key_heads() != 0 : p.heads() != 0) {
    at.fail_at("query", "has " + std::to_string(p.heads()) + " heads, which is no multiple of key's " +
                            std::to_string(p.key_heads()));
  }
}

inline void check_mask(const Checker& at, const AttentionOptions& p, std::initializer_list<DType> types) {
  if (!p.mask.defined()) return;
  at.dtype(p.mask, "mask", types);
  const int64_t full[] = {p.query.size(0), p.heads(), p.query.size(2), p.key.size(2)};
  bool fits = p.mask.ndim == 4;
  for (int d = 0; fits && d < 4; ++d) fits = p.mask.size(d) == 1 || p.mask.size(d) == full[d];
  if (!fits) at.fail_at("mask", "has shape " + p.mask.shape() + "; each size must be 1 or that of the scores");
  at.unit_last_stride(p.mask, "mask");
  if (p.packed()) at.fail_at("mask", "does not go with cu_seqlens");
}

inline void check_distance_bias(const Checker& at, const AttentionOptions& p) {
  if (!p.distance_bias.defined()) return;
  at.dtype(p.distance_bias, "distance_bias", {DType::f32});
  if (p.distance_bias.ndim != 2 || p.distance_bias.size(1) % 2 != 1) {
    at.fail_at("distance_bias", "must be (heads, 2 M + 1), got " + p.distance_bias.shape());
  }
  at.shape(p.distance_bias, "distance_bias", {p.heads(), p.distance_bias.size(1)});
  at.contiguous(p.distance_bias, "distance_bias");
}

inline void validate_options(const Checker& at, const AttentionOptions& p,
                             const AttentionTypes& types = kAttentionTypes) {
  check_operands(at, p, types.operands);
  check_mask(at, p, types.masks);
  if (p.cu_seqlens_q.defined() != p.cu_seqlens_k.defined()) at.fail_at("cu_seqlens_q", "and cu_seqlens_k go together");
  for (auto [t, argument] : NamedTensors{{&p.cu_seqlens_q, "cu_seqlens_q"}, {&p.cu_seqlens_k, "cu_seqlens_k"}}) {
    at.dtype(*t, argument, {DType::i32});
    at.contiguous(*t, argument);
    if (!t->defined()) continue;
    if (t->ndim != 1 || t->size(0) < 1) at.fail_at(argument, "must be (sequences + 1,), got " + t->shape());
    at.shape(*t, argument, {p.cu_seqlens_q.size(0)});
    if (p.query.size(0) != 1) at.fail_at(argument, "needs a batch of 1");
  }
  at.dtype(p.alibi_slopes, "alibi_slopes", {DType::f32});
  at.shape(p.alibi_slopes, "alibi_slopes", {p.sequences(), p.heads()});
  check_distance_bias(at, p);
  at.dtype(p.sinks, "sinks", {DType::f32});
  at.shape(p.sinks, "sinks", {p.heads()});
  at.contiguous(p.sinks, "sinks");
  at.probability(p.dropout_p, "dropout_p");
  if (p.dropout_p > 0) at.defined(p.seed, "seed");
  at.dtype(p.seed, "seed", {DType::i64});
  at.shape(p.seed, "seed", {1});
  if (!std::isfinite(p.scale)) at.fail_at("scale", "must be finite");
  if (!(std::isfinite(p.softcap) && p.softcap >= 0)) at.fail_at("softcap", "must be finite and at least 0");
  if (p.window_left < -1) at.fail_at("window_left", "must be at least 0, or -1 (unbounded)");
  if (p.window_right < -1) at.fail_at("window_right", "must be at least 0, or -1 (unbounded)");
}

// Tensors shaped like `like` but for the last size; float32 statistics lack it.
inline void check_like(const Checker& at, const TensorView& t, const char* argument, const TensorView& like,
                       int64_t last) {
  at.shape(t, argument, {like.size(0), like.size(1), like.size(2), last});
  at.unit_last_stride(t, argument);
}
inline void check_statistics(const Checker& at, const TensorView& t, const char* argument, const TensorView& query) {
  at.dtype(t, argument, {DType::f32});
  at.shape(t, argument, {query.size(0), query.size(1), query.size(2)});
  at.contiguous(t, argument);
}

inline void validate(const AttentionForward& p, const AttentionTypes& types = kAttentionTypes) {
  const Checker at{"attention"};
  validate_options(at, p, types);
  at.defined(p.output, "output");
  at.dtype(p.output, "output", {p.query.dtype});
  check_like(at, p.output, "output", p.query, p.value.size(3));
  for (auto [t, argument] : NamedTensors{{&p.lse, "lse"}, {&p.lse_low, "lse_low"}}) {
    at.defined(*t, argument);
    check_statistics(at, *t, argument, p.query);
  }
}

inline void validate(const AttentionBackward& p, const AttentionTypes& types = kAttentionTypes) {
  const Checker at{"attention backward"};
  validate_options(at, p, types);
  for (auto [t, argument] : NamedTensors{{&p.output, "output"}, {&p.grad_output, "grad_output"}}) {
    at.defined(*t, argument);
    at.dtype(*t, argument, {p.query.dtype});
    check_like(at, *t, argument, p.query, p.value.size(3));
  }
  for (auto [t, argument] : NamedTensors{{&p.lse, "lse"}, {&p.lse_low, "lse_low"}}) {
    at.defined(*t, argument);
    check_statistics(at, *t, argument, p.query);
  }
  check_statistics(at, p.grad_lse, "grad_lse", p.query);
  struct Gradient {
    const TensorView *gradient, *of;
    const char* argument;
  };
  for (auto [gradient, of, argument] :
       {Gradient{&p.grad_query, &p.query, "grad_query"}, Gradient{&p.grad_key, &p.key, "grad_key"},
        Gradient{&p.grad_value, &p.value, "grad_value"}}) {
    at.defined(*gradient, argument);
    at.dtype(*gradient, argument, {p.query.dtype});
    check_like(at, *gradient, argument, *of, of->size(3));
  }
  if (p.grad_mask.defined()) {
    at.defined(p.mask, "mask");
    at.dtype(p.grad_mask, "grad_mask", {DType::f32});
    at.shape(p.grad_mask, "grad_mask", {p.mask.size(0), p.mask.size(1), p.mask.size(2), p.mask.size(3)});
    at.contiguous(p.grad_mask, "grad_mask");
  }
  if (p.grad_distance_bias.defined()) {
    at.defined(p.distance_bias, "distance_bias");
    at.dtype(p.grad_distance_bias, "grad_distance_bias", {DType::f32});
    at.shape(p.grad_distance_bias, "grad_distance_bias", {p.heads(), p.distance_bias.size(1)});
    at.contiguous(p.grad_distance_bias, "grad_distance_bias");
  }
  if (p.grad_sinks.defined()) at.defined(p.sinks, "sinks");
  at.dtype(p.grad_sinks, "grad_sinks", {DType::f32});
  at.shape(p.grad_sinks, "grad_sinks", {p.heads()});
  at.contiguous(p.grad_sinks, "grad_sinks");
}

// The independent blocks of a call. Reads cu_seqlens, and refuses what does not cut the tokens into sequences: for
// backends whose boundaries lie in memory that this process can read. Tokens after the last boundary follow as rows
// that see no key and keys that no row sees.
inline std::vector<Sequence> sequences_of(const AttentionOptions& p, const char* op = "varlen_attention") {
  std::vector<Sequence> all;
  const int64_t count = p.sequences(), rows = p.query.size(2), keys = p.key.size(2);
  if (!p.packed()) {
    for (int64_t b = 0; b < count; ++b) all.push_back({b, b, 0, rows, 0, keys});
    return all;
  }
  const Checker at{op};
  check_boundaries(at, p.cu_seqlens_q, "cu_seqlens_q", rows, p.max_seqlen_q);
  check_boundaries(at, p.cu_seqlens_k, "cu_seqlens_k", keys, p.max_seqlen_k);
  const int32_t *q = p.cu_seqlens_q.as<int32_t>(), *k = p.cu_seqlens_k.as<int32_t>();
  for (int64_t n = 0; n < count; ++n) all.push_back({n, 0, q[n], q[n + 1] - q[n], k[n], k[n + 1] - k[n]});
  if (q[count] < rows) all.push_back({count, 0, q[count], rows - q[count], keys, 0});
  if (k[count] < keys) all.push_back({count, 0, rows, 0, k[count], keys - k[count]});
  return all;
}

}  // namespace llmengine::ops
