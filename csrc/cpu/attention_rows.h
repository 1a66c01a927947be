// What happens to a tile of rows, the same for attention and for relative attention: the forward's online softmax, and
// the backward's tiles. They differ in what makes logits of query key^T, which is up to `Scores`:
//
//   keys(row, row_end)                   the keys that rows [row, row_end) may see
//   place(row, rows, key, keys, stripe)  a tile, and what of it is seen
//   to_logits(at, tile, slope)           products become logits; slope receives the derivative of a soft cap
//   capped(), drops(), keep_multipliers(at, keep)
//
// (cpu/attention_tile.h has attention's.) Params: the forward's or the backward's of either operator.
//
// Several row tiles that share a key head go through the keys together: what has to be packed of a tile of keys is
// packed once for all of them, and lies in the core's own caches from the first to the last. Tiles of keys begin at
// multiples of kKeys, so that no row's result depends on who goes with it.
#pragma once

#include "cpu/attention_products.h"
#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// ---- tiles of rows and of keys --------------------------------------------------------------------------------------

// The row tiles of the query heads that share a key head: the last rows first, which have the most keys where attention
// is causal, and of each the heads side by side, which have the same ones.
struct RowTiles {
  int64_t group, rows;
  template <class Params>
  RowTiles(const Params& p, const ops::Sequence& s) : group(p.group()), rows(s.rows) {}

  int64_t count() const { return group * count_of(rows, kRows); }
  int64_t head(int64_t tile, int64_t key_head) const { return key_head * group + tile % group; }
  int64_t row(int64_t tile) const { return (count_of(rows, kRows) - 1 - tile / group) * kRows; }
};

// How many row tiles of so many floats go together: what a second-level cache holds beside keys and scores.
inline constexpr int64_t kTogether = 4;
constexpr int64_t tiles_together(int64_t floats) {
  return std::clamp<int64_t>((int64_t{1} << 18) / std::max<int64_t>(floats, 1), 1, kTogether);
}

// Keys [first, first + count) of a sequence, as the products read them.
template <class T>
struct KeyTile {
  int64_t first, count;
  typename Products<T>::Left key, value;    // for scores; the forward makes none of the values
  typename Products<T>::Summands summands;  // of rows: the values in the forward, the keys in the backward
};

// Makes the tiles of a key head.
template <class T, class Params>
class KeyTiles {
 public:
  using P = Products<T>;
  static int64_t floats(const Params& p) {
    const int64_t depth = p.key.size(3), width = p.value.size(3);
    return P::left_floats(depth) + P::left_floats(width) + P::summand_floats(std::max(depth, width));
  }
  KeyTiles(const Params& p, const ops::Sequence& s, int64_t key_head, float* memory)
      : count_(s.keys),
        key_(p.key, s.batch, key_head, s.key0),
        value_(p.value, s.batch, key_head, s.key0),
        keys_(memory),
        values_(keys_ + P::left_floats(key_.columns)),
        summands_(values_ + P::left_floats(value_.columns)) {}

  KeyTile<T> forward(int64_t first) const {
    const int64_t count = std::min(kKeys, count_ - first);
    return {first, count, P::left(key_, first, count, keys_), {}, P::summands(value_, first, count, summands_)};
  }
  KeyTile<T> backward(int64_t first) const {
    const int64_t count = std::min(kKeys, count_ - first);
    return {first, count, P::left(key_, first, count, keys_), P::left(value_, first, count, values_),
            P::summands(key_, first, count, summands_)};
  }

 private:
  int64_t count_;
  Rows<const T> key_, value_;
  float *keys_, *values_, *summands_;
};

// Calls body(row tile, key tile) for the tiles of keys, which make(first) makes, and those of `all` that see some of
// them.
template <class RowTile, class Make, class Body>
void for_key_tiles(int64_t keys, std::vector<RowTile>& all, const Make& make, const Body& body) {
  Span seen{keys, 0};
  for (const RowTile& rows : all) {
    const Span some = rows.keys();
    if (some.count() > 0) seen = {std::min(seen.begin, some.begin), std::max(seen.end, some.end)};
  }
  for (int64_t first = seen.begin / kKeys * kKeys; first < seen.end; first += kKeys) {
    const auto tile = make(first);
    for (RowTile& rows : all) {
      if (common(rows.keys(), {first, first + tile.count}).count() > 0) body(rows, tile);
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Calls body<size>(i) for the groups of `size` neighbours in a span, then body<1>(i) for those left over: what is done
// to a group is done side by side, where one after another would wait for results.
template <int size, class Body>
inline void for_groups(Span span, const Body& body) {
  int64_t i = span.begin;
  for (; i + size <= span.end; i += size) body.template operator()<size>(i);
  for (; i < span.end; ++i) body.template operator()<1>(i);
}

// Of each row: the largest logit so far, the sum of exp(logit - largest), and what the last tile scaled both by.
struct Statistics {
  alignas(64) float largest[kRows], total[kRows], beta[kRows];

  explicit Statistics(float sink) {  // a logit that comes before all others, or -inf
    std::fill_n(largest, kRows, sink);
    std::fill_n(total, kRows, sink == -INFINITY ? 0.0f : 1.0f);
  }

  // Logits become exponentials.
  void update(const TilePlace& at, float* tile) {
    for (int64_t v = 0; v < at.vectors(); ++v) {
      const int64_t lane = v * kLanes;
      const Span keys = at.keys_of(v);
      float* column = tile + lane;
      const F before = load(largest + lane), most = max(before, largest_of(column, keys));
      const F shift = select(most == -INFINITY, F{}, most);
      F sum = {};
      for_groups<4>(keys, [&]<int n>(int64_t c) {
        F e[n];
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) e[i] = load(column + (c + i) * kRows) - shift;
        exp_of_nonpositive(e);
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
          store(column + (c + i) * kRows, e[i]);
          sum += e[i];
        }
      });
      const F scale = exp_of_nonpositive(before - shift);
      store(beta + lane, scale);
      store(total + lane, load(total + lane) * scale + sum);
      store(largest + lane, most);
    }
  }

 private:
  static F largest_of(const float* column, Span keys) {
    F most[4];
    for (F& m : most) m = broadcast(-INFINITY);
    for_groups<4>(keys, [&]<int n>(int64_t c) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) most[i] = max(most[i], load(column + (c + i) * kRows));
    });
    return max(max(most[0], most[1]), max(most[2], most[3]));
  }
};

// Buffers of one thread for the tiles of scores that it makes; the forward makes one, p.
template <class T>
struct TileBuffers {
  static constexpr int64_t kFloats = 4 * kTile + Products<T>::kPairs / 2;
  float *p, *g, *keep, *slope;
  bf16* pairs;

  explicit TileBuffers(float* memory)
      : p(memory), g(p + kTile), keep(g + kTile), slope(keep + kTile), pairs(reinterpret_cast<bf16*>(slope + kTile)) {}
};

// kRows rows of one head, from `row` on. `scores`: of that head, and open for these rows.
template <class T, class Params, class Scores>
class ForwardRows {
 public:
  using P = Products<T>;
  static int64_t floats(const Params& p) {
    return P::transposed_floats(p.query.size(3)) + kRows * padded(p.value.size(3));
  }

  ForwardRows(const Params& p, const ops::Sequence& s, int64_t head, int64_t row, Scores scores, float* memory)
      : p_(p),
        s_(s),
        head_(head),
        row_(row),
        rows_(std::min(kRows, s.rows - row)),
        scores_(std::move(scores)),
        query_(memory),
        sums_(memory + P::transposed_floats(p.query.size(3))),
        statistics_(p.sink(s, head)) {
    P::transpose_rows(Rows<const T>(p.query, s.batch, head, s.row0 + row), rows_, query_);
    std::fill_n(sums_, kRows * padded(p.value.size(3)), 0.0f);
  }

  Span keys() const { return scores_.keys(row_, row_ + rows_); }

  void add(const KeyTile<T>& keys, const TileBuffers<T>& to) {
    const TilePlace at = scores_.place(row_, rows_, keys.first, keys.count, P::kStripe);
    P::scores(at, keys.key, p_.query.size(3), static_cast<float>(p_.scale), query_, to.p);
    scores_.to_logits(at, to.p);
    statistics_.update(at, to.p);
    if (scores_.drops()) {
      scores_.keep_multipliers(at, to.keep);
      for_scores(at, to.p, [&](int64_t, int64_t, float* x) { store(x, load(x) * load(to.keep + (x - to.p))); });
    }
    P::add_to_rows(at, to.p, keys.summands, p_.value.size(3), statistics_.beta, sums_, to.pairs);
  }

  void write() const {
    alignas(64) float factors[kRows] = {};
    const int64_t statistic = (s_.batch * p_.heads() + head_) * p_.query.size(2) + s_.row0 + row_;
    for (int64_t r = 0; r < rows_; ++r) {
      const float total = statistics_.total[r];
      factors[r] = total == 0.0f ? 0.0f : 1.0f / total;
      const double log = std::log(static_cast<double>(total)), largest = total == 0.0f ? 0.0 : statistics_.largest[r];
      const float high = static_cast<float>(largest + log);
      p_.lse.template as<float>()[statistic + r] = high;
      p_.lse_low.template as<float>()[statistic + r] =
          std::isinf(high) ? 0.0f : static_cast<float>((largest - high) + log);  // no sum beyond 2^53 holds log
    }
    P::write_rows(sums_, rows_, factors, Rows<T>(p_.output, s_.batch, head_, s_.row0 + row_));
  }

 private:
  const Params& p_;
  const ops::Sequence& s_;
  int64_t head_, row_, rows_;
  Scores scores_;
  float *query_, *sums_;
  Statistics statistics_;
};

// Row tiles [first, end) of a key head. make_scores(n, head, row): the scores of the nth of them.
template <class T, class Params, class MakeScores>
void forward_tiles(const Params& p, const ops::Sequence& s, int64_t key_head, Span tiles,
                   const MakeScores& make_scores) {
  using RowTile = ForwardRows<T, Params, decltype(make_scores(0, 0, 0))>;
  const RowTiles places(p, s);
  const int64_t floats = RowTile::floats(p);
  thread_local Scratch scratch;
  const auto [keys, buffers, memory] =
      scratch.take(KeyTiles<T, Params>::floats(p), TileBuffers<T>::kFloats, floats * tiles.count());
  const TileBuffers<T> to(buffers);
  [[maybe_unused]] const typename Products<T>::Session session;
  std::vector<RowTile> all;
  all.reserve(static_cast<size_t>(tiles.count()));
  for (int64_t n = tiles.begin; n < tiles.end; ++n) {
    const int64_t head = places.head(n, key_head), row = places.row(n);
    all.emplace_back(p, s, head, row, make_scores(n - tiles.begin, head, row), memory + (n - tiles.begin) * floats);
  }
  const KeyTiles<T, Params> key_tiles(p, s, key_head, keys);
  for_key_tiles(
      s.keys, all, [&](int64_t first) { return key_tiles.forward(first); },
      [&](RowTile& rows, const KeyTile<T>& tile) { rows.add(tile, to); });
  for (const RowTile& rows : all) rows.write();
}

// All rows of a call. make_scores(sequence, n, head, row)
template <class T, class Params, class MakeScores>
void forward_all(const Params& p, const std::vector<ops::Sequence>& sequences, const MakeScores& make_scores) {
  int64_t all = 0;
  for (const ops::Sequence& s : sequences) all += p.key_heads() * RowTiles(p, s).count();
  const int64_t floats = (p.query.size(3) + padded(p.value.size(3))) * kRows;
  const int64_t together = std::clamp<int64_t>(all / (4 * num_threads()), 1, tiles_together(floats));
  const auto chunks = [&](const ops::Sequence& s) { return count_of(RowTiles(p, s).count(), together); };
  const SequenceTasks tasks(sequences, [&](size_t s) { return p.key_heads() * chunks(sequences[s]); });
  parallel_each(tasks.size(), [&](int64_t index) {
    const auto [s, which, number] = tasks[index];
    const int64_t first =
        number / p.key_heads() * together;  // of all heads the last rows first: no long task at the end
    const Span tiles{first, std::min(first + together, RowTiles(p, s).count())};
    forward_tiles<T>(p, s, number % p.key_heads(), tiles,
                     [&](int64_t n, int64_t head, int64_t row) { return make_scores(s, n, head, row); });
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Where the gradients of a key head's keys from `first` on are added up, in rows of padded columns.
struct KeySums {
  float *key, *value;
  int64_t first = 0;
};

// kRows rows of one head, from `row` on.
template <class T, class Params, class Scores>
class BackwardRows {
 public:
  using P = Products<T>;
  static int64_t floats(const Params& p) {
    const int64_t depth = p.query.size(3), width = p.value.size(3);
    return P::transposed_floats(depth) + P::transposed_floats(width) + P::right_floats(depth) +
           std::max(P::right_floats(width), P::transposed_floats(width)) + kRows * padded(depth);
  }

  BackwardRows(const Params& p, const ops::Sequence& s, int64_t head, int64_t row, Scores scores, float* memory)
      : p_(p),
        s_(s),
        head_(head),
        row_(row),
        rows_(std::min(kRows, s.rows - row)),
        depth_(p.query.size(3)),
        width_(p.value.size(3)),
        scores_(std::move(scores)),
        query_transposed_(memory),
        grad_transposed_(query_transposed_ + P::transposed_floats(depth_)),
        grad_query_(grad_transposed_ + P::transposed_floats(width_)) {
    const Rows<const T> query(p.query, s.batch, head, s.row0 + row);
    const Rows<const T> grad(p.grad_output, s.batch, head, s.row0 + row);
    float *queries = grad_query_ + kRows * padded(depth_), *grads = queries + P::right_floats(depth_);
    P::transpose_rows(query, rows_, query_transposed_);
    P::transpose_rows(grad, rows_, grad_transposed_);
    make_delta(grads);
    query_ = P::right(query, 0, rows_, queries);
    grad_ = P::right(grad, 0, rows_, grads);
    std::fill_n(grad_query_, kRows * padded(depth_), 0.0f);
    read_lse();
  }

  Span keys() const { return scores_.keys(row_, row_ + rows_); }
  int64_t head() const { return head_; }
  int64_t row() const { return row_; }
  const Scores& scores() const { return scores_; }

  // P keep and P (grad_P keep - delta), the gradient of the logits
  TilePlace make_tiles(const KeyTile<T>& keys, const TileBuffers<T>& to) const {
    const TilePlace at = scores_.place(row_, rows_, keys.first, keys.count, P::kStripe);
    P::scores(at, keys.value, width_, 1.0f, grad_transposed_, to.g);
    P::scores(at, keys.key, depth_, static_cast<float>(p_.scale), query_transposed_, to.p);
    scores_.to_logits(at, to.p, to.slope);
    if (scores_.drops()) scores_.keep_multipliers(at, to.keep);
    for_stripes(at.keys, P::kStripe, [&](int64_t stripe, int count) {
      const Span vectors = at.vectors_of(stripe);
      for (int64_t v = vectors.begin; v < vectors.end; ++v) {
        for_groups<3>({stripe, stripe + count}, [&]<int n>(int64_t c) { differentiate<n>(v, c, to); });
      }
    });
    return at;
  }

  // The tiles' part in the gradients.
  void accumulate(const TilePlace& at, const KeyTile<T>& keys, const TileBuffers<T>& tiles, const KeySums& sums) {
    if (scores_.capped()) {
      for_scores(at, tiles.g,
                 [&](int64_t, int64_t, float* x) { store(x, load(x) * load(tiles.slope + (x - tiles.g))); });
    }
    P::add_to_keys(at, tiles.p, grad_, width_, sums.value + (at.key - sums.first) * padded(width_), tiles.pairs);
    P::add_to_keys(at, tiles.g, query_, depth_, sums.key + (at.key - sums.first) * padded(depth_), tiles.pairs);
    P::add_to_rows(at, tiles.g, keys.summands, depth_, nullptr, grad_query_, tiles.pairs);
  }

  void write() const {
    alignas(64) float factors[kRows];
    std::fill_n(factors, kRows, static_cast<float>(p_.scale));
    P::write_rows(grad_query_, rows_, factors, Rows<T>(p_.grad_query, s_.batch, head_, s_.row0 + row_));
  }

  // The rows' part in the gradient of the head's sink.
  double grad_sink() const {
    const float sink = p_.sink(s_, head_);
    double sum = 0.0;
    if (sink == -INFINITY) return sum;  // so it is in rows of no sequence, whatever their gradients hold
    for (int64_t r = 0; r < rows_; ++r) sum -= double{std::exp(sink - lse_[r] - lse_low_[r])} * delta_[r];
    return sum;
  }

 private:
  // The softmax and its derivative, of a vector's scores with n keys from c on.
  template <int n>
  void differentiate(int64_t v, int64_t c, const TileBuffers<T>& to) const {
    const int64_t lane = v * kLanes, first = c * kRows + lane;
    const F lse = load(lse_ + lane), lse_low = load(lse_low_ + lane), delta = load(delta_ + lane);
    F p[n], g[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) p[i] = load(to.p + first + i * kRows) - lse - lse_low;
    exp_of_nonpositive(p);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const int64_t score = first + i * kRows;
      g[i] = load(to.g + score);
      if (scores_.drops()) g[i] *= load(to.keep + score);
      g[i] = p[i] * (g[i] - delta);
      if (scores_.drops()) p[i] *= load(to.keep + score);
      store(to.p + score, p[i]);
      store(to.g + score, g[i]);
    }
  }

  // delta = rowsum(grad_output output), added in the order of grad_P: where a row has one key, and output is its value,
  // delta takes the rounding errors of grad_P with it.
  void make_delta(float* memory) {
    const Rows<const T> output(p_.output, s_.batch, head_, s_.row0 + row_);
    P::row_products(output, rows_, grad_transposed_, memory, delta_);
  }

  void read_lse() {
    const int64_t statistic = (s_.batch * p_.heads() + head_) * p_.query.size(2) + s_.row0 + row_;
    std::fill_n(lse_, kRows, INFINITY);  // of lanes without a row: their probabilities are 0
    std::fill_n(lse_low_, kRows, 0.0f);
    for (int64_t r = 0; r < rows_; ++r) {
      const float lse = p_.lse.template as<float>()[statistic + r];
      lse_[r] = lse == -INFINITY ? 0.0f : lse;
      lse_low_[r] = p_.lse_low.template as<float>()[statistic + r];
      if (p_.grad_lse.defined()) delta_[r] -= p_.grad_lse.template as<float>()[statistic + r];
    }
  }

  const Params& p_;
  const ops::Sequence& s_;
  int64_t head_, row_, rows_, depth_, width_;
  Scores scores_;
  float *query_transposed_, *grad_transposed_, *grad_query_;
  typename P::Right query_, grad_;
  alignas(64) float lse_[kRows], lse_low_[kRows], delta_[kRows];
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
