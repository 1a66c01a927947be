// log sum exp of a row that arrives in blocks (the online softmax of Milakov & Gimelshein 2018, by blocks: one
// rescaling a block, one exponential an element). NaN and +inf end as NaN, a row of -inf alone as -inf.
#pragma once

#include "cpu/vec_math.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// The largest of n elements; -inf for none. NaN is passed over: the exponentials bring it back.
template <class T>
inline float largest_of(const T* x, int64_t n) {
  F most[4] = {broadcast(-INFINITY), broadcast(-INFINITY), broadcast(-INFINITY), broadcast(-INFINITY)};
  for_lanes_by_4(n, [&](int64_t i, auto count, auto k) { most[k] = max(most[k], load_n(x + i, count, -INFINITY)); });
  return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

// What to subtract before exponentials: the largest element, or 0 where all are -inf (whose exponentials are then 0).
inline float shift_for(float largest) { return largest == -INFINITY ? 0.0f : largest; }

struct LogSumExp {
  float largest = -INFINITY, total = 0.0f;  // total = sum of exp(z - shift_for(largest))

  // next: n elements that will be wanted after these. Memory would rest while exponentials are computed.
  template <class T = float>
  void add(const float* z, int64_t n, const T* next = nullptr) {
    const float block = largest_of(z, n);
    if (block > largest) {
      total *= std::exp(largest - block);
      largest = block;
    }
    const float shift = shift_for(largest);
    F sums[4] = {};
    for_lanes_by_4(n, [&](int64_t i, auto count, auto k) {
      if (next) __builtin_prefetch(next + i);
      sums[k] = sums[k] + exp_of_nonpositive(load_n(z + i, count, -INFINITY) - shift);
    });
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // The sum over the elements of both.
  void add(const LogSumExp& other) {
    if (other.largest > largest) {
      total *= std::exp(largest - other.largest);
      largest = other.largest;
    }
    const bool none = other.largest == -INFINITY;  // its total is 0, or NaN
    total += none ? other.total : other.total * std::exp(other.largest - largest);
  }

  double value() const { return shift_for(largest) + std::log(static_cast<double>(total)); }
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
