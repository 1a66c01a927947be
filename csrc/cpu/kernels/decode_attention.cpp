// Attention of a few new tokens over a cache (formulas: ops/decode_attention.h), its keys split among tasks
// (flash-decoding: Dao et al. 2023), so that one sequence with one head keeps every thread busy.
//
//   A task owns up to kSplit keys of one key head of one sequence, beginning at a multiple of kSplit, and all rows of
//   all query heads that share them. Keys and values are read where they lie, through a list of their addresses, which
//   is all that pages change; the next ones are asked for ahead of time, as heads may lie between them. Rows are taken
//   up to four at a time:
//
//     scores of kLanes / rows keys     a vector of sums for each (row, key), lanes along head_dim; the kLanes sums of
//                                      lanes become one vector of scores
//     logits, maximum m, exp(x - m)    vectors along the keys
//     sums of exp(x - m) value         lanes along value_dim, in registers for all keys of the split
//
//   and leave m, the sum of exponentials and those of values in a buffer, from which a second pass over heads adds up
//   the splits in their order. What a row gets depends on nothing but its own sequence: not on threads, nor on the
//   batch.
//
//   Memory: keys and values once, (head_dim + value_dim) elements a key for 2 (head_dim + value_dim) flops a row.
//   Limit: reading them, from whatever level holds them, below about 8 rows in floats.
#include "ops/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile_gemm.h"
#include "cpu/vec_math.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kSplit = 128;
constexpr int64_t kAhead = 16;       // values that are on their way while one is added
constexpr int64_t kGrain = 1 << 16;  // multiply-adds for which a thread is woken

// x[0] = x[0]'s and x[step]'s sums over lanes that differ in bit `step`, those of x[step] where the bit is set.
template <int step, int... lane>
inline void add_halves(F (&x)[kLanes], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < step; ++i) {
    const F own = shuffle<(lane & step ? kLanes + lane : lane)...>(x[i], x[i + step]);
    x[i] = own + shuffle<(lane & step ? kLanes + (lane ^ step) : lane ^ step)...>(x[i], x[i + step]);
  }
}

// Lane i is the sum of the lanes of x[i].
template <int step = kLanes / 2>
inline F sums_of_lanes(F (&x)[kLanes]) {
  add_halves<step>(x, Lanes());
  if constexpr (step > 1) return sums_of_lanes<step / 2>(x);
  return x[0];
}

// Calls body<rows>(first) for groups of 4, 2 and 1 of n rows.
template <class Body>
inline void for_row_groups(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) body.template operator()<4>(i);
  for (; i + 2 <= n; i += 2) body.template operator()<2>(i);
  if (i < n) body.template operator()<1>(i);
}

// What a split leaves of each row, rows counted within the heads of a group: head after head.
struct Partials {
  int64_t rows, width;
  float* data;  // of one split: rows maxima, rows sums of exponentials, rows x width sums of values

  static int64_t floats(int64_t rows, int64_t width) { return rows * (2 + width); }
  float& largest(int64_t row) const { return data[row]; }
  float& total(int64_t row) const { return data[rows + row]; }
  float* sums(int64_t row) const { return data + 2 * rows + row * width; }
};

template <class T>
class Decoder {
 public:
  explicit Decoder(const ops::DecodeAttention& p)
      : p_(p),
        depth_(p.query.size(3)),
        width_(p.value_cache.size(3)),
        rows_(p.group() * p.rows()),
        key_steps_(p.steps(p.key_cache)),
        value_steps_(p.steps(p.value_cache)) {
    first_.push_back(0);
    for (int64_t b = 0; b < p.batch(); ++b) {
      const Span keys = keys_of(b);
      first_.push_back(first_.back() + p.key_heads() * std::max<int64_t>(0, end_split(keys) - keys.begin / kSplit));
    }
    floats_ = Partials::floats(rows_, round_up(width_, kLanes));
    partials_.reset(new float[static_cast<size_t>(first_.back() * floats_)]);
  }

  void run() const {
    const int64_t work = rows_ * kSplit * (depth_ + width_);
    parallel_rows(first_.back(), work, kGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) attend(task);
    });
    const int64_t heads = p_.batch() * p_.key_heads();
    const int64_t splits = heads ? first_.back() / heads + 1 : 1;
    parallel_rows(heads, rows_ * splits * width_, kGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) combine(i / p_.key_heads(), i % p_.key_heads());
    });
  }

 private:
  int64_t length(int64_t b) const { return p_.cache_lengths.as<int32_t>()[b]; }
  // The keys that any row of the sequence sees.
  Span keys_of(int64_t b) const { return {ops::first_key(length(b), p_.rows(), p_.window_left), length(b)}; }
  static int64_t end_split(Span keys) { return (keys.end + kSplit - 1) / kSplit; }
  int64_t splits(int64_t b) const { return (first_[b + 1] - first_[b]) / p_.key_heads(); }
  Partials partials(int64_t task) const { return {rows_, round_up(width_, kLanes), partials_.get() + task * floats_}; }

  // Where a sequence's keys lie, or its values.
  void find(const TensorView& cache, const ops::CacheSteps& steps, int64_t b, int64_t head, Span keys,
            const T** to) const {
    const int32_t* table = p_.paged() ? p_.block_table.as<int32_t>() + b * p_.block_table.size(1) : nullptr;
    for (int64_t key = keys.begin; key < keys.end;) {
      const int64_t n = key / p_.page_size(), slot = key % p_.page_size();
      const int64_t end = std::min(keys.end, (n + 1) * p_.page_size());
      const T* at = cache.as<T>() + (table ? table[n] : b) * steps.page + slot * steps.slot + head * steps.head;
      for (; key < end; ++key, at += steps.slot) *to++ = at;
    }
  }

  // ---- a split ----

  // Tasks of a sequence: all splits of its first key head, of its second, ...
  void attend(int64_t task) const {
    const int64_t b = std::upper_bound(first_.begin(), first_.end(), task) - first_.begin() - 1;
    const int64_t number = task - first_[b], head = number / splits(b);
    const Span all = keys_of(b);
    const int64_t start = (all.begin / kSplit + number % splits(b)) * kSplit;
    const Span keys = common(all, {start, start + kSplit});
    const T *key[kSplit + 2 * kLanes], *value[kSplit + kAhead];
    find(p_.key_cache, key_steps_, b, head, keys, key);
    find(p_.value_cache, value_steps_, b, head, keys, value);
    // what is read beyond the last key, in a vector of scores and ahead of time
    std::fill_n(key + keys.count(), 2 * kLanes, key[keys.count() - 1]);
    std::fill_n(value + keys.count(), kAhead, value[keys.count() - 1]);
    const int64_t padded = round_up(depth_, kLanes);
    thread_local Scratch scratch;
    const auto [query, weights] = scratch.take(rows_ * padded, 4 * kSplit);
    for (int64_t g = 0; g < p_.group(); ++g) {
      const T* from = p_.query.as<T>() + b * p_.query.stride(0) + (head * p_.group() + g) * p_.query.stride(1);
      pack_rows(from, p_.query.stride(2), p_.rows(), depth_, query + g * p_.rows() * padded, padded);
    }
    const Partials to = partials(task);
    for_row_groups(rows_, [&]<int rows>(int64_t first) {
      make_scores<rows>(query + first * padded, key, keys.count(), weights);
      for (int r = 0; r < rows; ++r) make_weights(b, head, first + r, keys, weights + r * kSplit, to);
      add_values<rows>(weights, value, keys.count(), to.sums(first), to.width);
    });
  }

  // query key^T, rows kSplit apart; up to a vector beyond the last key of each.
  template <int rows>
  void make_scores(const float* query, const T* const* key, int64_t count, float* scores) const {
    constexpr int kTogether = kLanes / rows;
    const int64_t padded = round_up(depth_, kLanes);
    for (int64_t c = 0; c < count; c += kTogether) {
      F sums[kLanes] = {};
      for_lanes(depth_, [&](int64_t d, auto n) {
        F q[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) q[r] = load(query + r * padded + d);
        if (d % kLine == 0) {
#pragma GCC unroll 16
          for (int k = 0; k < kTogether; ++k) __builtin_prefetch(key[c + k + kTogether] + d);
        }
#pragma GCC unroll 16
        for (int k = 0; k < kTogether; ++k) {
          const F x = load_n(key[c + k] + d, n);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sums[r * kTogether + k] += q[r] * x;
        }
      });
      float lanes[kLanes];
      store(lanes, sums_of_lanes(sums));
      for (int r = 0; r < rows; ++r) std::memcpy(scores + r * kSplit + c, lanes + r * kTogether, 4 * kTogether);
    }
  }

  // Scores of a row become exp(logit - maximum), 0 where the row does not see the key.
  void make_weights(int64_t b, int64_t key_head, int64_t row, Span keys, float* x, const Partials& to) const {
    const int64_t head = key_head * p_.group() + row / p_.rows();
    const int64_t position = length(b) - p_.rows() + row % p_.rows(), here = position - keys.begin;
    const Span seen{p_.window_left < 0 ? 0 : std::clamp<int64_t>(here - p_.window_left, 0, keys.count()),
                    std::clamp<int64_t>(here + 1, 0, keys.count())};
    make_logits(b, head, here, x, keys.count());
    F most = broadcast(-INFINITY), total = {};
    const F lanes = to_float(__builtin_bit_cast(I, lane_numbers()));
    for (int64_t c = 0; c < keys.count(); c += kLanes) {
      const F place = lanes + static_cast<float>(c);
      const I outside = (place < static_cast<float>(seen.begin)) | (place >= static_cast<float>(seen.end));
      const F logits = select(outside, broadcast(-INFINITY), load(x + c));
      store(x + c, logits);
      most = max(most, logits);
    }
    const float largest = reduce_max(most), shift = largest == -INFINITY ? 0.0f : largest;
    for (int64_t c = 0; c < keys.count(); c += kLanes) {
      const F weight = exp_of_nonpositive(load(x + c) - shift);
      store(x + c, weight);
      total += weight;
    }
    to.largest(row) = largest;
    to.total(row) = sum(total);
  }

  // `here`: the row's position, counted from the first of the keys.
  void make_logits(int64_t b, int64_t head, int64_t here, float* x, int64_t count) const {
    const float scale = static_cast<float>(p_.scale), cap = static_cast<float>(p_.softcap);
    for (int64_t c = 0; c < count; c += kLanes) {
      F u = load(x + c) * scale;
      if (cap > 0) u = tanh(u * static_cast<float>(1.0 / p_.softcap)) * cap;
      store(x + c, u);
    }
    if (p_.alibi_slopes.defined()) {
      const float slope = p_.alibi_slopes.as<float>()[b * p_.alibi_slopes.stride(0) + head * p_.alibi_slopes.stride(1)];
      for (int64_t c = 0; c < count; ++c) x[c] -= slope * static_cast<float>(std::abs(here - c));
    }
    if (p_.distance_bias.defined()) {
      const int64_t farthest = p_.farthest();
      const float* table = p_.distance_bias.as<float>() + head * p_.distance_bias.size(1) + farthest;
      for (int64_t c = 0; c < count; ++c) {
        const float bias = table[std::clamp(c - here, -farthest, farthest)];
        x[c] = bias == -INFINITY ? bias : x[c] + bias;  // a key that is not seen, whatever its score
      }
    }
  }

  template <int rows>
  void add_values(const float* weights, const T* const* value, int64_t count, float* to, int64_t stride) const {
    constexpr int kVectors = std::min(8, kLanes / rows);
    int64_t d = 0;
    const auto add = [&]<int vectors>(auto n) {
      F sums[rows][vectors] = {};
      for (int64_t c = 0; c < count; ++c) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          if (v * kLanes % kLine == 0) __builtin_prefetch(value[c + kAhead] + d + v * kLanes);
          const F x = load_n(value[c] + d + v * kLanes, n);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sums[r][v] += broadcast(weights[r * kSplit + c]) * x;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store(to + r * stride + d + v * kLanes, sums[r][v]);
      }
      d += vectors * kLanes;
    };
    constexpr std::integral_constant<int, kLanes> whole{};
    while (d + kVectors * kLanes <= width_) add.template operator()<kVectors>(whole);
    while (d + kLanes <= width_) add.template operator()<1>(whole);
    if (d < width_) add.template operator()<1>(static_cast<int>(width_ - d));
  }

  // ---- all splits ----

  void combine(int64_t b, int64_t key_head) const {
    const int64_t task = first_[b] + key_head * splits(b), count = splits(b);
    thread_local Scratch scratch;
    const auto [sums, factors] = scratch.take(round_up(width_, kLanes), count);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t head = key_head * p_.group() + row / p_.rows(), r = row % p_.rows();
      const float sink = p_.sinks.defined() ? p_.sinks.as<float>()[head] : -INFINITY;
      float largest = sink;
      for (int64_t s = 0; s < count; ++s) largest = greater(largest, partials(task + s).largest(row));
      const float shift = largest == -INFINITY ? 0.0f : largest;
      float total = std::exp(sink - shift);
      for (int64_t s = 0; s < count; ++s) {
        const Partials part = partials(task + s);
        factors[s] = std::exp(part.largest(row) - shift);
        total += factors[s] * part.total(row);
      }
      const float share = total == 0.0f ? 0.0f : 1.0f / total;
      T* out = p_.output.as<T>() + b * p_.output.stride(0) + head * p_.output.stride(1) + r * p_.output.stride(2);
      for_lanes(width_, [&](int64_t d, auto n) {
        F x = {};
        for (int64_t s = 0; s < count; ++s) x += load(partials(task + s).sums(row) + d) * factors[s];
        store_n(out + d, x * share, n);
      });
      p_.lse.as<float>()[(b * p_.heads() + head) * p_.rows() + r] =
          total == 0.0f ? -INFINITY : static_cast<float>(std::log(static_cast<double>(total)) + largest);
    }
  }
  static float greater(float a, float b) { return a < b ? b : a; }  // NaN in `a` stays, one in `b` shows in the total

  static constexpr int kLine = 64 / sizeof(T);  // elements that come from memory together

  const ops::DecodeAttention& p_;
  const int64_t depth_, width_, rows_;
  const ops::CacheSteps key_steps_, value_steps_;
  int64_t floats_;
  std::vector<int64_t> first_;  // task of each sequence
  std::unique_ptr<float[]> partials_;
};

void decode_attention(const ops::DecodeAttention& p) {
  ops::check_contents(p);
  if (p.batch() * p.heads() * p.rows() == 0) return;
  visit_float(p.query.dtype, [&]<class T>(T) { Decoder<T>(p).run(); });
}

const Registrar<ops::DecodeAttention> decode{decode_attention};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
