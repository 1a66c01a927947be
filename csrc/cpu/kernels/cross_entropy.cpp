// Cross-entropy of rows of logits, forward and backward (formulas: ops/cross_entropy.h).
//
//   A thread owns a run of rows. Forward: a row goes by in blocks of 4 KiB, each turned into capped floats in a scratch
//   block where it is not already that, and added to the running log-sum-exp: memory is read once. Backward: one read,
//   one write. Limit: e bytes an element forward, 2e backward (e: bytes an element), or, in bf16, the exponential's 15
//   instructions a vector.
#include "ops/cross_entropy.h"

#include <algorithm>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/token_loss.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // rows worth waking a thread for
constexpr int64_t kBlock = 1024;

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
      const double lse = labelled ? log_sum_exp(x, row + 1 < end ? x + p.input.stride(0) : x, weighted) : 0.0;
      p.lse.as<float>()[row] = static_cast<float>(lse);
      p.losses.as<float>()[row] = labelled ? token.value(target, lse, logit(x[target]), weighted) : 0.0f;
    }
  }

  float logit(T x) const { return cap.active() ? cap(broadcast(widen(x)))[0] : widen(x); }

  // of one row, after which comes `next`; with label smoothing also the sum of w_c z_c
  double log_sum_exp(const T* x, const T* next, double& weighted) const {
    float scratch[kBlock];
    LogSumExp lse;
    for (int64_t first = 0; first < token.classes; first += kBlock) {
      const int64_t n = std::min(kBlock, token.classes - first);
      const float* z = block(x + first, n, scratch);
      lse.add(z, n, first + n < token.classes ? x + first + n : next);
      if (token.label_smoothing > 0) weighted += weighted_sum(token.weight ? token.weight + first : nullptr, z, n);
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
  const LogitsGradient gradient{token, Cap{p.softcap}};
  const double scale = loss_scale(p);

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
      gradient(x, grad, 0, token.classes, target, lse, factors);
    }
  }
};

void cross_entropy_forward(const ops::CrossEntropyForward& p) {
  const ops::TokenLoss token{p.weight, p.input.size(1), p.label_smoothing, p.z_loss};
  visit_float(p.input.dtype, [&]<class T>(T) {
    const Forward<T> kernel{p, token};
    parallel_rows(p.input.size(0), token.classes, kGrainElements,
                  [&](int64_t begin, int64_t end, int) { kernel(begin, end); });
  });
  reduce_losses(p, token);
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
