// Attention with relative positions of packed sequences (Transformer-XL: Dai et al. 2019; two streams, permutations and
// segments: XLNet, Yang et al. 2019), in tiles with an online softmax as ops/attention.h.
//
//   u(i, j) = scale (query_i . key_j + position_query_i . r(p_i - j) + segment_scores_i[g_i != h_j])
//   logits = u where row i sees key j, else -inf;  lse, P and output from the logits as in ops/attention.h
//
//   p_i            the row's position among the keys of its sequence: query_positions[i], or i + keys - rows
//   r(d)           row d + zero_distance of position_key, which covers every p_i - j of a sequence (the d >= 0, where
//                  the call is causal)
//   g, h           query_segments and key_segments
//   row i sees j   if key_ranks[j] < query_ranks[i] (where ranks are given) or include_self and j = p_i;
//                  and if j <= p_i, where the call is causal
//
//   backward, with grad_u = scale P ((grad_output value^T) Z - delta) as in ops/attention.h:
//     grad_query_i          = sum_j grad_u(i, j) key_j,       grad_key_j = sum_i grad_u(i, j) query_i
//     grad_position_query_i = sum_j grad_u(i, j) r(p_i - j), grad_r(d) = sum over p_i - j = d of grad_u(i, j)
//                                                                        position_query_i
//     grad_segment_scores_i[s] = sum of grad_u(i, j) over the keys of which (g_i != h_j) = s
//
//   The public function adds its biases to query and makes the segment scores
//   (llmengine/functional/relative_attention.py).
#pragma once

#include "ops/attention.h"

namespace llmengine::ops {

// `query` bears the content scores. Of AttentionOptions' fields, those that are not listed here keep their defaults.
struct RelativeAttentionOptions : AttentionOptions {
  TensorView position_query;                // like query
  TensorView position_key;                  // (1, heads, distances, head_dim)
  TensorView segment_scores;                // float32 (rows, heads, 2), or none
  TensorView query_segments, key_segments;  // int32 (rows,) and (keys,), where there are segment_scores
  TensorView query_positions;               // int32 (rows,), or none
  TensorView query_ranks, key_ranks;        // int32 (rows,) and (keys,), or none
  int64_t zero_distance = 0;
  bool is_causal = false, include_self = false;

  static constexpr auto fields() {
    using P = RelativeAttentionOptions;
    return std::tuple{field("query", &P::query),
                      field("position_query", &P::position_query),
                      field("key", &P::key),
                      field("value", &P::value),
                      field("position_key", &P::position_key),
                      field("segment_scores", &P::segment_scores),
                      field("query_segments", &P::query_segments),
                      field("key_segments", &P::key_segments),
                      field("query_positions", &P::query_positions),
                      field("query_ranks", &P::query_ranks),
                      field("key_ranks", &P::key_ranks),
                      field("cu_seqlens_q", &P::cu_seqlens_q),
                      field("cu_seqlens_k", &P::cu_seqlens_k),
                      field("max_seqlen_q", &P::max_seqlen_q),
                      field("max_seqlen_k", &P::max_seqlen_k),
                      field("seed", &P::seed),
                      field("zero_distance", &P::zero_distance),
                      field("is_causal", &P::is_causal),
                      field("include_self", &P::include_self),
                      field("scale", &P::scale),
                      field("dropout_p", &P::dropout_p)};
  }

  int64_t distances() const { return position_key.size(2); }
  // Of a row of a sequence. Before all keys a causal row sees none, wherever it stands.
  int64_t position(const Sequence& s, int64_t row) const {
    const int64_t at = query_positions.defined() ? query_positions.as<int32_t>()[s.row0 + row] : row + s.keys - s.rows;
    return is_causal && at < -1 ? -1 : at;
  }
};

struct RelativeAttentionForward : RelativeAttentionOptions {
  TensorView output;  // like query, with value_dim
  TensorView lse;     // float32 (1, heads, rows)
  TensorView lse_low;

  static constexpr auto fields() {
    using P = RelativeAttentionForward;
    return std::tuple_cat(
        RelativeAttentionOptions::fields(),
        std::tuple{field("output", &P::output), field("lse", &P::lse), field("lse_low", &P::lse_low)});
  }
};

struct RelativeAttentionBackward : RelativeAttentionOptions {
  TensorView grad_output;  // like output
  TensorView grad_lse;     // like lse, or none
  TensorView output, lse, lse_low;
  TensorView grad_query, grad_position_query, grad_key, grad_value, grad_position_key;
  TensorView grad_segment_scores;  // like segment_scores, where there are any

  static constexpr auto fields() {
    using P = RelativeAttentionBackward;
    return std::tuple_cat(
        RelativeAttentionOptions::fields(),
        std::tuple{field("grad_output", &P::grad_output), field("grad_lse", &P::grad_lse), field("output", &P::output),
                   field("lse", &P::lse), field("lse_low", &P::lse_low), field("grad_query", &P::grad_query),
                   field("grad_position_query", &P::grad_position_query), field("grad_key", &P::grad_key),
                   field("grad_value", &P::grad_value), field("grad_position_key", &P::grad_position_key),
                   field("grad_segment_scores", &P::grad_segment_scores)});
  }
};

inline void validate_options(const Checker& at, const RelativeAttentionOptions& p) {
  validate_options(at, static_cast<const AttentionOptions&>(p));
  for (auto [t, argument] : NamedTensors{{&p.cu_seqlens_q, "cu_seqlens_q"}, {&p.cu_seqlens_k, "cu_seqlens_k"}}) {
    at.defined(*t, argument);
  }
  if (p.key_heads() != p.heads()) at.fail_at("key", "must have as many heads as query");
  const int64_t heads = p.heads(), rows = p.query.size(2), keys = p.key.size(2), head_dim = p.query.size(3);
  for (auto [t, argument] : NamedTensors{{&p.position_query, "position_query"}, {&p.position_key, "position_key"}}) {
    at.defined(*t, argument);
    at.dtype(*t, argument, {p.query.dtype});
    if (t->ndim != 4) at.fail_at(argument, "must be (1, heads, rows, head_dim), got " + t->shape());
    at.unit_last_stride(*t, argument);
  }
  at.shape(p.position_query, "position_query", {1, heads, rows, head_dim});
  at.shape(p.position_key, "position_key", {1, heads, p.distances(), head_dim});
  at.dtype(p.segment_scores, "segment_scores", {DType::f32});
  at.shape(p.segment_scores, "segment_scores", {rows, heads, 2});
  at.contiguous(p.segment_scores, "segment_scores");
  struct Numbers {
    const TensorView* numbers;
    const char* argument;
    int64_t count;
    bool given;
  };
  const bool segments = p.segment_scores.defined(), ranks = p.query_ranks.defined() || p.key_ranks.defined();
  for (auto [numbers, argument, count, given] :
       {Numbers{&p.query_segments, "query_segments", rows, segments},
        Numbers{&p.key_segments, "key_segments", keys, segments}, Numbers{&p.query_ranks, "query_ranks", rows, ranks},
        Numbers{&p.key_ranks, "key_ranks", keys, ranks}, Numbers{&p.query_positions, "query_positions", rows, false}}) {
    if (given) at.defined(*numbers, argument);
    at.dtype(*numbers, argument, {DType::i32});
    at.shape(*numbers, argument, {count});
    at.contiguous(*numbers, argument);
  }
}

inline void validate(const RelativeAttentionForward& p) {
  const Checker at{"relative_attention"};
  validate_options(at, p);
  at.defined(p.output, "output");
  at.dtype(p.output, "output", {p.query.dtype});
  check_like(at, p.output, "output", p.query, p.value.size(3));
  for (auto [t, argument] : NamedTensors{{&p.lse, "lse"}, {&p.lse_low, "lse_low"}}) {
    at.defined(*t, argument);
    check_statistics(at, *t, argument, p.query);
  }
}

inline void validate(const RelativeAttentionBackward& p) {
  const Checker at{"relative_attention backward"};
  validate_options(at, p);
  for (auto [t, argument] : NamedTensors{{&p.lse, "lse"}, {&p.lse_low, "lse_low"}}) {
    at.defined(*t, argument);
    check_statistics(at, *t, argument, p.query);
  }
  check_statistics(at, p.grad_lse, "grad_lse", p.query);
  struct Like {
    const TensorView *tensor, *like;
    int64_t last;
    const char* argument;
  };
  const int64_t head_dim = p.query.size(3), value_dim = p.value.size(3);
  for (auto [tensor, like, last, argument] :
       {Like{&p.output, &p.query, value_dim, "output"}, Like{&p.grad_output, &p.query, value_dim, "grad_output"},
        Like{&p.grad_query, &p.query, head_dim, "grad_query"},
        Like{&p.grad_position_query, &p.query, head_dim, "grad_position_query"},
        Like{&p.grad_key, &p.key, head_dim, "grad_key"}, Like{&p.grad_value, &p.value, value_dim, "grad_value"},
        Like{&p.grad_position_key, &p.position_key, head_dim, "grad_position_key"}}) {
    at.defined(*tensor, argument);
    at.dtype(*tensor, argument, {p.query.dtype});
    check_like(at, *tensor, argument, *like, last);
  }
  if (p.segment_scores.defined()) at.defined(p.grad_segment_scores, "grad_segment_scores");
  at.dtype(p.grad_segment_scores, "grad_segment_scores", {DType::f32});
  at.shape(p.grad_segment_scores, "grad_segment_scores", {p.query.size(2), p.heads(), 2});
  at.contiguous(p.grad_segment_scores, "grad_segment_scores");
}

// The first and last distance p_i - j in a sequence that has rows and keys.
struct Distances {
  int64_t first, last;
};

inline Distances distances_of(const RelativeAttentionOptions& p, const Sequence& s, int64_t row, int64_t row_end) {
  Distances d{INT64_MAX, INT64_MIN};
  for (int64_t r = row; r < row_end; ++r) {
    const int64_t position = p.position(s, r);
    d = {std::min(d.first, position - s.keys + 1), std::max(d.last, position)};
  }
  return d;
}

// The sequences, as sequences_of(AttentionOptions); refuses positions whose distances position_key does not cover.
inline std::vector<Sequence> sequences_of(const RelativeAttentionOptions& p) {
  const Checker at{"relative_attention"};
  std::vector<Sequence> all = sequences_of(static_cast<const AttentionOptions&>(p), at.op);
  for (const Sequence& s : all) {
    if (s.rows == 0 || s.keys == 0) continue;
    const Distances d = distances_of(p, s, 0, s.rows);
    const int64_t first = p.is_causal ? std::max<int64_t>(d.first, 0) : d.first;
    if (first > d.last || (first >= -p.zero_distance && d.last < p.distances() - p.zero_distance)) continue;
    at.fail_at("position_key", "covers the distances " + std::to_string(-p.zero_distance) + " to " +
                                   std::to_string(p.distances() - p.zero_distance - 1) + " (zero_distance " +
                                   std::to_string(p.zero_distance) + "), but sequence " + std::to_string(s.index) +
                                   " has " + std::to_string(first) + " to " + std::to_string(d.last));
  }
  return all;
}

}  // namespace llmengine::ops
