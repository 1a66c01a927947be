// Attention of a few new tokens of each sequence over the keys and values that a generation has kept, their own among
// them.
//
//   Sequence b holds n = cache_lengths[b] tokens in its cache; its `rows` queries belong to the last of them. Row r
//   stands at p = n - rows + r and sees keys p - window_left ... p (window_left < 0: 0 ... p).
//
//   u = scale query key^T
//   logits = cap(u) - slope (p - key) + distance_bias[head, max(key - p, -M) + M],  cap(u) = softcap tanh(u / softcap)
//   lse = log (exp(sinks[head]) + sum_keys exp(logits)),  output = exp(logits - lse) value
//   A row that sees no key (n is 0, or less than rows): output 0, lse -inf, or the sink's logit.
//
//   Query heads [g group, (g + 1) group) share key head g. Slots that hold no token of the sequence are never read.
//
//   A cache is (batch, key heads, capacity, head_dim), or is cut into pages (Kwon et al. 2023): (pages, page size,
//   key heads, head_dim), and slot t of sequence b lies in page block_table[b, t / page size] as its slot
//   t mod page size. The first is the second with one page a sequence, the sequence's own.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

// Strides of a cache, in elements.
struct CacheSteps {
  int64_t page, slot, head;
};

struct DecodeAttention {
  TensorView query;                   // (batch, heads, rows, head_dim), unit last stride like the caches
  TensorView key_cache, value_cache;  // see above; head_dim and value_dim wide
  TensorView cache_lengths;           // int32 (batch,)
  TensorView block_table;             // int32 (batch, pages of a sequence), or none
  TensorView alibi_slopes;            // float32 (batch, heads), or none
  TensorView distance_bias;           // float32 (heads, 2 M + 1), or none: entries above M are of keys that no row sees
  TensorView sinks;                   // float32 (heads,), or none
  int64_t window_left = -1;
  double scale = 1.0, softcap = 0.0;
  TensorView output;  // (batch, heads, rows, value_dim)
  TensorView lse;     // float32 (batch, heads, rows)

  static constexpr auto fields() {
    using P = DecodeAttention;
    return std::tuple{field("query", &P::query),
                      field("key_cache", &P::key_cache),
                      field("value_cache", &P::value_cache),
                      field("cache_lengths", &P::cache_lengths),
                      field("block_table", &P::block_table),
                      field("alibi_slopes", &P::alibi_slopes),
                      field("distance_bias", &P::distance_bias),
                      field("sinks", &P::sinks),
                      field("window_left", &P::window_left),
                      field("scale", &P::scale),
                      field("softcap", &P::softcap),
                      field("output", &P::output),
                      field("lse", &P::lse)};
  }

  bool paged() const { return block_table.defined(); }
  int64_t batch() const { return query.size(0); }
  int64_t heads() const { return query.size(1); }
  int64_t rows() const { return query.size(2); }
  int64_t key_heads() const { return key_cache.size(paged() ? 2 : 1); }
  int64_t group() const { return key_heads() ? heads() / key_heads() : 1; }
  int64_t pages() const { return key_cache.size(0); }
  int64_t page_size() const { return key_cache.size(paged() ? 1 : 2); }
  int64_t capacity() const { return paged() ? block_table.size(1) * page_size() : page_size(); }  // of a sequence
  int64_t farthest() const { return distance_bias.size(1) / 2; }                                  // M
  CacheSteps steps(const TensorView& cache) const {
    return {cache.stride(0), cache.stride(paged() ? 1 : 2), cache.stride(paged() ? 2 : 1)};
  }
};

// The first key that any of the rows sees; what the cache holds before it is not looked at.
template <class Int>
constexpr Int first_key(Int length, Int rows, Int window_left) {
  const Int first = length - rows - window_left;
  return window_left < 0 || first < 0 ? 0 : first;
}

// The keys that one of several blocks takes of a sequence: of those that any row sees, in rounds of `round` keys, as
// even a number of rounds for each as there is. Every length has its own shares, so that no block waits for a long one.
struct KeyShare {
  int begin, end;
};
constexpr KeyShare share_of(int length, int rows, int window_left, int round, int share, int shares) {
  const int begin = first_key(length, rows, window_left);
  const int rounds = (length - begin + round - 1) / round, each = rounds / shares, more = rounds % shares;
  const int from = share * each + (share < more ? share : more), to = from + each + (share < more);
  const int end = begin + to * round;
  return {begin + from * round, end < length ? end : length};
}

inline void check_caches(const Checker& at, const DecodeAttention& p, std::initializer_list<DType> types) {
  for (auto [t, argument] :
       NamedTensors{{&p.query, "query"}, {&p.key_cache, "key_cache"}, {&p.value_cache, "value_cache"}}) {
    at.defined(*t, argument);
    at.dtype(*t, argument, types);
    at.dtype(*t, argument, {p.query.dtype});
    if (t->ndim != 4) at.fail_at(argument, "must have four dimensions, got " + t->shape());
    at.unit_last_stride(*t, argument);
  }
  const TensorView& key = p.key_cache;
  at.shape(key, "key_cache", {p.paged() ? key.size(0) : p.batch(), key.size(1), key.size(2), p.query.size(3)});
  at.shape(p.value_cache, "value_cache", {key.size(0), key.size(1), key.size(2), p.value_cache.size(3)});
  if (p.key_heads() ? p.heads() % p.key_heads() != 0 : p.heads() != 0) {
    at.fail_at("query", "has " + std::to_string(p.heads()) + " heads, which is no multiple of key_cache's " +
                            std::to_string(p.key_heads()));
  }
  at.defined(p.cache_lengths, "cache_lengths");
  at.dtype(p.cache_lengths, "cache_lengths", {DType::i32});
  at.shape(p.cache_lengths, "cache_lengths", {p.batch()});
  at.contiguous(p.cache_lengths, "cache_lengths");
  at.dtype(p.block_table, "block_table", {DType::i32});
  at.contiguous(p.block_table, "block_table");
  if (!p.paged()) return;
  if (p.block_table.ndim != 2) at.fail_at("block_table", "must be (batch, pages), got " + p.block_table.shape());
  at.shape(p.block_table, "block_table", {p.batch(), p.block_table.size(1)});
}

inline void validate(const DecodeAttention& p, std::initializer_list<DType> types = {DType::f32, DType::bf16}) {
  const Checker at{"decode_attention"};
  at.dtype(p.block_table, "block_table", {DType::i32});
  check_caches(at, p, types);
  at.dtype(p.alibi_slopes, "alibi_slopes", {DType::f32});
  at.shape(p.alibi_slopes, "alibi_slopes", {p.batch(), p.heads()});
  at.dtype(p.distance_bias, "distance_bias", {DType::f32});
  if (p.distance_bias.defined() && (p.distance_bias.ndim != 2 || p.distance_bias.size(1) % 2 != 1)) {
    at.fail_at("distance_bias", "must be (heads, 2 M + 1), got " + p.distance_bias.shape());
  }
  at.shape(p.distance_bias, "distance_bias", {p.heads(), p.distance_bias.size(1)});
  at.contiguous(p.distance_bias, "distance_bias");
  at.dtype(p.sinks, "sinks", {DType::f32});
  at.shape(p.sinks, "sinks", {p.heads()});
  at.contiguous(p.sinks, "sinks");
  if (p.window_left < -1) at.fail_at("window_left", "must be at least 0, or -1 (unbounded)");
  if (!std::isfinite(p.scale)) at.fail_at("scale", "must be finite");
  if (!(std::isfinite(p.softcap) && p.softcap >= 0)) at.fail_at("softcap", "must be finite and at least 0");
  at.defined(p.output, "output");
  at.dtype(p.output, "output", {p.query.dtype});
  at.shape(p.output, "output", {p.batch(), p.heads(), p.rows(), p.value_cache.size(3)});
  at.unit_last_stride(p.output, "output");
  at.defined(p.lse, "lse");
  at.dtype(p.lse, "lse", {DType::f32});
  at.shape(p.lse, "lse", {p.batch(), p.heads(), p.rows()});
  at.contiguous(p.lse, "lse");
}

// What lengths and table say, for backends whose memory this process can read.
inline void check_contents(const DecodeAttention& p) {
  const Checker at{"decode_attention"};
  const auto refuse = [&](const char* argument, const std::string& place, int64_t given, const std::string& allowed) {
    at.fail_at(argument, "is " + std::to_string(given) + " at " + place + "; allowed: 0 to " + allowed);
  };
  for (int64_t b = 0; b < p.batch(); ++b) {
    const int64_t length = p.cache_lengths.as<int32_t>()[b];
    if (length < 0 || length > p.capacity()) {
      refuse("cache_lengths", std::to_string(b), length, std::to_string(p.capacity()) + ", the slots of a sequence");
    }
    if (!p.paged()) continue;
    const int64_t first = first_key(length, p.rows(), p.window_left);
    for (int64_t n = first / std::max<int64_t>(p.page_size(), 1); n * p.page_size() < length; ++n) {
      const int64_t page = p.block_table.as<int32_t>()[b * p.block_table.size(1) + n];
      if (page < 0 || page >= p.pages()) {
        refuse("block_table", "(" + std::to_string(b) + ", " + std::to_string(n) + ")", page,
               std::to_string(p.pages() - 1));
      }
    }
  }
}

}  // namespace llmengine::ops
