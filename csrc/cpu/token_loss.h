// What cross-entropy does to the logits of one row, whether they lie in memory or come out of a product: shared by
// cross_entropy.cpp and linear_cross_entropy.cpp (formulas: ops/cross_entropy.h).
#pragma once

#include "cpu/log_sum_exp.h"
#include "ops/cross_entropy.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// x as float; where softcap > 0, softcap tanh(x / softcap)
struct Cap {
  float softcap, inverse;
  explicit Cap(double cap)
      : softcap(static_cast<float>(cap)), inverse(cap > 0 ? static_cast<float>(1.0 / cap) : 0.0f) {}
  bool active() const { return softcap > 0; }
  F operator()(F x) const { return tanh(x * inverse) * softcap; }
};

// sum of z, or of weight z
inline float weighted_sum(const float* weight, const float* z, int64_t n) {
  F sums[4] = {};
  for_lanes_by_4(n, [&](int64_t i, auto count, auto k) {
    const F value = load_n(z + i, count);
    sums[k] = sums[k] + (weight ? load_n(weight + i, count) * value : value);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Writes the gradient of classes [first, first + n) of one row, whose uncapped logits begin at x; x and grad may be
// one, and need not be of one type. The target's is finished in float before its one rounding: (p_y - 1) rounded apart
// would lose it as p_y nears 1.
struct LogitsGradient {
  const ops::TokenLoss& token;
  const Cap cap;

  template <class From, class To>
  void operator()(const From* x, To* grad, int64_t first, int64_t n, int64_t target, float lse,
                  const ops::TokenLoss::Gradient& factors) const {
    const int64_t y = target - first;
    const bool here = y >= 0 && y < n;
    const float of_target = here ? at_target(x[y], target, lse, factors) : 0.0f;
    if (cap.active()) {
      write<true>(x, grad, first, n, lse, factors);
    } else {
      write<false>(x, grad, first, n, lse, factors);
    }
    if (here) narrow(of_target, grad + y);
  }

 private:
  template <class T>
  float at_target(T x, int64_t target, float lse, const ops::TokenLoss::Gradient& factors) const {
    const F value = broadcast(widen(x));
    const F z = cap.active() ? cap(value) : value;
    const float w = token.weight ? token.weight[target] : 1.0f;
    const float grad = exp_of_nonpositive(z - lse)[0] * factors.probability - w * factors.smoothing - factors.target;
    const float t = z[0] * cap.inverse;
    return cap.active() ? grad * (1.0f - t * t) : grad;
  }

  template <bool capped, class From, class To>
  void write(const From* x, To* grad, int64_t first, int64_t n, float lse,
             const ops::TokenLoss::Gradient& factors) const {
    const float* weight = token.weight && factors.smoothing != 0.0f ? token.weight + first : nullptr;
    for_lanes(n, [&](int64_t c, auto count) {
      F z = load_n(x + c, count);
      if constexpr (capped) z = cap(z);
      const F smoothing = weight ? load_n(weight + c, count) * factors.smoothing : broadcast(factors.smoothing);
      F g = exp_of_nonpositive(z - lse) * factors.probability - smoothing;
      if constexpr (capped) {
        const F t = z * cap.inverse;
        g = g * (1.0f - t * t);
      }
      store_n(grad + c, g, count);
    });
  }
};

// losses -> loss and normaliser, in row order, so that thread counts change no bit.
template <class Params>
void reduce_losses(const Params& p, const ops::TokenLoss& token) {
  double total = 0.0, weights = 0.0;
  const bool mean = p.reduction == "mean";
  for (int64_t row = 0; row < p.input.size(0); ++row) {
    total += p.losses.template as<float>()[row];
    const int64_t target = p.target.template as<int64_t>()[row];
    if (mean && target != p.ignore_index) weights += token.weight_of(target);
  }
  *p.normaliser.template as<float>() = mean ? static_cast<float>(weights) : 1.0f;
  if (p.reduction == "none") return;
  *p.loss.template as<float>() = static_cast<float>(!mean ? total : weights == 0 ? 0.0 : total / weights);
}

// What a backward multiplies grad_loss by.
inline double loss_scale(const ops::CrossEntropyOptions& p) {
  if (p.reduction != "mean") return 1.0;
  const float normaliser = *p.normaliser.as<float>();
  return normaliser == 0.0f ? 0.0 : 1.0 / normaliser;
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
