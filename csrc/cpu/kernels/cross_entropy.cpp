// Cross-entropy of rows of logits, forward and backward (formulas: ops/cross_entropy.h).
//
//   A thread owns a run of rows. Forward: a row goes by in blocks of 4 KiB, each turned into capped floats in a scratch
//   block where it is not already that, and added to the running log-sum-exp: memory is read once. Backward: one read,
//   one write. Limit: e bytes an element forward, 2e backward (e: bytes an element), or, in bf16, the exponential's 15
//   instructions a vector. The target's gradient is finished in float before its one rounding: (p_y - 1) rounded apart
//   would lose it as p_y nears 1. Losses are summed in row order, so that thread counts change no bit.
#include "ops/cross_entropy.h"

#include <algorithm>
#include <type_traits>

#include "cpu/log_sum_exp.h"
#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // rows worth waking a thread for
constexpr int64_t kBlock = 1024;

// x as float; where softcap > 0, softcap tanh(x / softcap)
struct Cap {
  float softcap, inverse;
  explicit Cap(double cap)
      : softcap(static_cast<float>(cap)), inverse(cap > 0 ? static_cast<float>(1.0 / cap) : 0.0f) {}
  bool active() const { return softcap > 0; }
  F operator()(F x) const { return tanh(x * inverse) * softcap; }
};

float dot(const float* weight, const float* z, int64_t n) {
  F sums[4] = {};
  for_lanes_by_4(n, [&](int64_t i, auto count, auto k) {
    const F value = load_n(z + i, count);
    sums[k] = sums[k] + (weight ? load_n(weight + i, count) * value : value);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
struct Forward {
  const ops::CrossEntropyForward& p;
  const ops::TokenLoss& token;
  const Cap cap{p.softcap};

  void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = p.target.as<int64_t>()[row];
      const bool labelled = token.labelled("cross_entropy", target, row, p.ignore_index);
      const T* x = p.input.as<T>() + row * p.input.stride(0);
      double weighted = 0.0;
      const float lse = p.lse.as<float>()[row] = labelled ? log_sum_exp(x, weighted) : 0.0f;
      p.losses.as<float>()[row] = labelled ? token.value(target, lse, logit(x[target]), weighted) : 0.0f;
    }
  }

  float logit(T x) const { return cap.active() ? cap(broadcast(widen(x)))[0] : widen(x); }

  // of one row; with label smoothing also the sum of w_c z_c
  float log_sum_exp(const T* x, double& weighted) const {
    float scratch[kBlock];
    LogSumExp lse;
    for (int64_t first = 0; first < token.classes; first += kBlock) {
      const int64_t n = std::min(kBlock, token.classes - first);
      const float* z = block(x + first, n, scratch);
      lse.add(z, n);
      if (token.label_smoothing > 0) weighted += dot(token.weight ? token.weight + first : nullptr, z, n);
    }
    return lse.value();
  }

  const float* block(const T* x, int64_t n, float* scratch) const {
    if constexpr (std::is_same_v<T, float>) {
      if (!cap.active()) return x;
    }
    for_lanes(n, [&](int64_t i, auto count) {
      const F value = load_n(x + i, count);
      store_n(scratch + i, cap.active() ? cap(value) : value, count);
    });
    return scratch;
  }
};

template <class T>
struct Backward {
  const ops::CrossEntropyBackward& p;
  const ops::TokenLoss& token;
  const Cap cap{p.softcap};
  const double scale = mean_scale();

  double mean_scale() const {
    if (p.reduction != "mean") return 1.0;
    const float normaliser = *p.normaliser.as<float>();
    return normaliser == 0.0f ? 0.0 : 1.0 / normaliser;
  }

  void operator()(int64_t begin, int64_t end) const {
    const int64_t grad_stride = p.grad_loss.ndim ? p.grad_loss.stride(0) : 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = p.target.as<int64_t>()[row];
      T* grad = p.grad_input.as<T>() + row * p.grad_input.stride(0);
      if (!token.labelled("cross_entropy backward", target, row, p.ignore_index)) {
        for_lanes(token.classes, [&](int64_t c, auto n) { store_n(grad + c, F{}, n); });
        continue;
      }
      const float lse = p.lse.as<float>()[row];
      const auto factors = token.gradient(target, lse, p.grad_loss.as<float>()[row * grad_stride] * scale);
      const T* x = p.input.as<T>() + row * p.input.stride(0);
      if (cap.active()) {
        write<true>(x, grad, lse, factors);
      } else {
        write<false>(x, grad, lse, factors);
      }
      narrow(of_class(target, x[target], lse, factors), grad + target);
    }
  }

  // the gradient at class c, that of the target included, before it is rounded
  float of_class(int64_t c, T x, float lse, const ops::TokenLoss::Gradient& factors) const {
    const F value = broadcast(widen(x));
    const F z = cap.active() ? cap(value) : value;
    const float w = token.weight ? token.weight[c] : 1.0f;
    const float grad = exp_of_nonpositive(z - lse)[0] * factors.probability - w * factors.smoothing - factors.target;
    const float t = z[0] * cap.inverse;
    return cap.active() ? grad * (1.0f - t * t) : grad;
  }

  template <bool capped>
  void write(const T* x, T* grad, float lse, const ops::TokenLoss::Gradient& factors) const {
    const float* weight = factors.smoothing != 0.0f ? token.weight : nullptr;
    for_lanes(token.classes, [&](int64_t c, auto n) {
      F z = load_n(x + c, n);
      if constexpr (capped) z = cap(z);
      const F smoothing = weight ? load_n(weight + c, n) * factors.smoothing : broadcast(factors.smoothing);
      F g = exp_of_nonpositive(z - lse) * factors.probability - smoothing;
      if constexpr (capped) {
        const F t = z * cap.inverse;
        g = g * (1.0f - t * t);
      }
      store_n(grad + c, g, n);
    });
  }
};

void reduce(const ops::CrossEntropyForward& p, const ops::TokenLoss& token) {
  double total = 0.0, weights = 0.0;
  const bool mean = p.reduction == "mean";
  for (int64_t row = 0; row < p.input.size(0); ++row) {
    total += p.losses.as<float>()[row];
    const int64_t target = p.target.as<int64_t>()[row];
    if (mean && target != p.ignore_index) weights += token.weight_of(target);
  }
  *p.normaliser.as<float>() = mean ? static_cast<float>(weights) : 1.0f;
  if (p.reduction != "none")
    *p.loss.as<float>() = static_cast<float>(!mean ? total : weights == 0 ? 0.0 : total / weights);
}

void cross_entropy_forward(const ops::CrossEntropyForward& p) {
  const ops::TokenLoss token{p.weight, p.input.size(1), p.label_smoothing, p.z_loss};
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Forward<T> kernel{p, token};
    parallel_rows(p.input.size(0), token.classes, kGrainElements,
                  [&](int64_t begin, int64_t end, int) { kernel(begin, end); });
  });
  reduce(p, token);
}

void cross_entropy_backward(const ops::CrossEntropyBackward& p) {
  const ops::TokenLoss token{p.weight, p.input.size(1), p.label_smoothing, p.z_loss};
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Backward<T> kernel{p, token};
    parallel_rows(p.input.size(0), token.classes, kGrainElements,
                  [&](int64_t begin, int64_t end, int) { kernel(begin, end); });
  });
}

const Registrar<ops::CrossEntropyForward> forward{cross_entropy_forward};
const Registrar<ops::CrossEntropyBackward> backward{cross_entropy_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
