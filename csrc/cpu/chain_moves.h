// What the three kernels of the chain field share: one step of the forward or backward algorithm, and how a call is cut
// into tasks (formulas: ops/chain_field.h).
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>

#include "cpu/log_sum_exp.h"
#include "cpu/parallel.h"
#include "cpu/tile_gemm.h"
#include "ops/chain_field.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// Calls body(task, begin, end) for runs of sequences. The runs depend on shapes alone, never on the number of threads:
// what is summed over a run, and then over runs in their order, is the same for all.
inline int64_t chain_tasks(const ops::ChainField& p) {
  constexpr int64_t kWork = 1 << 17;    // multiplications worth a task
  constexpr int64_t kLatency = 1 << 9;  // a step takes as long as so many, however few it has
  const int64_t work = p.tokens() * (p.tag_count() * p.tag_count() + kLatency);
  return std::clamp<int64_t>(work / kWork, 1, std::clamp<int64_t>(p.sequences(), 1, 64));
}
template <class Body>
void parallel_sequences(const ops::ChainField& p, const Body& body) {
  const int64_t tasks = chain_tasks(p), sequences = p.sequences();
  parallel_each(tasks, [&](int64_t task) { body(task, sequences * task / tasks, sequences * (task + 1) / tasks); });
}

// Lines of one number a tag are as wide as whole vectors. K numbers, and -inf behind them:
inline void fill_line(const TensorView& numbers, int64_t width, float* line) {
  std::fill(std::copy_n(numbers.as<float>(), numbers.size(0), line), line + width, -INFINITY);
}

// Calls body(first, std::integral_constant<int, n>) for groups of n vectors, at most 4, that cover a line: as many
// chains of dependent instructions are then in flight.
template <class Body>
void for_vectors(int64_t width, const Body& body) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) body(j, std::integral_constant<int, 4>{});
  switch ((width - j) / kLanes) {
    case 3: return body(j, std::integral_constant<int, 3>{});
    case 2: return body(j, std::integral_constant<int, 2>{});
    case 1: return body(j, std::integral_constant<int, 1>{});
  }
}

// y = exp(x) for x <= 0
inline void exp_line(const float* x, int64_t width, float* y) {
  for_lanes(width, [&](int64_t j, auto n) { store_n(y + j, exp_of_nonpositive(load_n(x + j, n)), n); });
}

// x += emissions of a token; then what is returned is taken off: the largest, so that x <= 0.
template <class T>
float add_and_center(const T* emissions, int64_t tags, int64_t width, float* x) {
  F most = broadcast(-INFINITY);
  for_lanes(tags, [&](int64_t j, auto n) {
    const F sum = load(x + j) + load_n(emissions + j, n, -INFINITY);
    store(x + j, sum);
    most = max(most, sum);
  });
  const float shift = shift_for(reduce_max(most));
  for_lanes(width, [&](int64_t j, auto n) { store_n(x + j, load_n(x + j, n) - shift, n); });
  return shift;
}

// y = softmax(x), 0 where all are -inf; returns log sum exp(x). Padding of x: -inf.
inline float softmax_line(const float* x, int64_t width, float* y) {
  const float shift = shift_for(largest_of(x, width));
  F sums{};
  for_lanes(width, [&](int64_t j, auto n) {
    const F e = exp_of_nonpositive(load_n(x + j, n) - shift);
    sums = sums + e;
    store_n(y + j, e, n);
  });
  const float total = sum(sums), scale = total == 0.0f ? 0.0f : 1.0f / total;
  for_lanes(width, [&](int64_t j, auto n) { store_n(y + j, load_n(y + j, n) * scale, n); });
  return shift + std::log(total);
}

// The transitions as one direction sums over them: log sum_i exp(x_i + transition of i and j) for all j, where i comes
// before j (forward) or behind it. As a product with exp(transition - largest) wherever that is exact in float, and
// otherwise, for the j in question, with K exponentials.
class Moves {
 public:
  // A sum of this size has lost less than 2^-38 of itself: each of its at most 2 K terms 2^-126, by exp's underflow.
  static constexpr float kSmallestSum = 0x1p-80f;
  const int64_t tags, width;

  Moves(const TensorView& transition, bool forward)
      : tags(transition.size(0)),
        width(round_up(tags, kLanes)),
        largest_(shift_for(largest_of(transition.as<float>(), tags * tags))) {
    std::tie(odds_, lines_, padding_) = std::tuple_cat(memory_.take(tags * width, tags * width, width));
    const float* values = transition.as<float>();
    for (int64_t i = 0; i < tags; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const bool inside = j < tags;
        odds_[i * width + j] = inside ? (forward ? values[i * tags + j] : values[j * tags + i]) - largest_ : -INFINITY;
        lines_[i * width + j] = inside ? (forward ? values[j * tags + i] : values[i * tags + j]) : -INFINITY;
      }
    }
    exp_line(odds_, tags * width, odds_);
    for (int64_t j = 0; j < width; ++j) padding_[j] = j < tags ? 0.0f : 1.0f;
  }

  float largest() const { return largest_; }                         // transition, or 0 where all are -inf
  const float* line(int64_t j) const { return lines_ + j * width; }  // transitions of j, by i

  // x <= 0, weights = exp(x). logs: of the sums less largest(); sums: nearly, within 2^-118. Padding: 0 and 1.
  void operator()(const float* x, const float* weights, float* sums, float* logs, float* spare) const {
    F lowest = broadcast(INFINITY);
    for_vectors(width, [&](int64_t j, auto vectors) { products<vectors>(weights, j, sums, logs, lowest); });
    if (!(-reduce_max(-lowest) < kSmallestSum)) return;
    for (int64_t j = 0; j < tags; ++j) {
      if (sums[j] < kSmallestSum) logs[j] = exactly(x, j, spare);
    }
  }

 private:
  template <int kVectors>
  void products(const float* weights, int64_t first, float* sums, float* logs, F& lowest) const {
    constexpr int kWays = kVectors > 2 ? 2 : 4;  // chains of additions in flight
    F total[kWays][kVectors] = {};
    const float* row = odds_ + first;
    const auto add = [&](int way, int64_t i) {
      const F weight = broadcast(weights[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        total[way][v] = total[way][v] + weight * load(row + i * width + v * kLanes);
      }
    };
    int64_t i = 0;
    for (; i + kWays <= tags; i += kWays) {
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) add(way, i + way);
    }
    for (; i < tags; ++i) add(0, i);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      F s = total[0][v] + total[1][v];
      if constexpr (kWays == 4) s = s + (total[2][v] + total[3][v]);
      const int64_t j = first + v * kLanes;
      s = s + load(padding_ + j);
      lowest = min(lowest, s);
      store(sums + j, s);
      store(logs + j, log_of_normal(s));
    }
  }

  float exactly(const float* x, int64_t j, float* spare) const {
    for_lanes(width, [&](int64_t i, auto n) { store_n(spare + i, load_n(x + i, n) + load_n(line(j) + i, n), n); });
    LogSumExp all;
    all.add(spare, tags);
    return static_cast<float>(all.value() - largest_);
  }

  Scratch memory_;
  float *odds_, *lines_, *padding_;  // (i, j): exp(transition - largest), 0 in padding; (j, i), -inf in padding; (j)
  float largest_;
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
