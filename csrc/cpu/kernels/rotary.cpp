// Rotary position embedding, forward and backward (formulas: ops/rotary.h).
//
//   A thread owns a run of tokens with all their heads: the token's cosines and sines are read once and stay in the
//   first-level cache. Interleaved pairs are turned where they lie, as x cos2 + swapped(x) sin2: swapped exchanges the
//   lanes of each pair, and cos2 and sin2 hold every number twice, sin2 with the sign of its place, in a line made once
//   a token. Limit: memory bandwidth, 2 e bytes an element (e: bytes an element), for a few instructions a vector.
#include "ops/rotary.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // rows worth waking a thread for

struct Turn {
  const TensorView &from, &cos, &sin, &to;
  bool interleaved;
  float sign;  // of the angles

  int64_t pairs() const { return cos.size(1); }
  int64_t rows() const { return from.size(0) * from.size(1); }
};

template <class T>
void turn_halves(const T* x, const float* cos, const float* sin, float sign, int64_t pairs, T* y) {
  for_lanes(pairs, [&](int64_t k, auto n) {
    const F a = load_n(x + k, n), b = load_n(x + pairs + k, n);
    const F c = load_n(cos + k, n), s = load_n(sin + k, n) * sign;
    store_n(y + k, a * c - b * s, n);
    store_n(y + pairs + k, b * c + a * s, n);
  });
}

template <int... lane>
F swapped(F x, std::integer_sequence<int, lane...>) {
  return shuffle<(lane ^ 1)...>(x, x);
}

template <class T>
void turn_neighbours(const T* x, const float* cos2, const float* sin2, int64_t features, T* y) {
  for_lanes(features, [&](int64_t k, auto n) {
    const F pair = load_n(x + k, n);
    const F other = swapped(pair, Lanes());
    store_n(y + k, pair * load_n(cos2 + k, n) + other * load_n(sin2 + k, n), n);
  });
}

template <class T>
void turn_rows(const Turn& p, int64_t begin, int64_t end) {
  const int64_t tokens = p.from.size(1), heads = p.from.size(2), head_dim = p.from.size(3), pairs = p.pairs();
  std::vector<float> cos2(2 * pairs), sin2(2 * pairs);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % tokens;
    const float *cos = p.cos.as<float>() + token * pairs, *sin = p.sin.as<float>() + token * pairs;
    for (int64_t k = 0; p.interleaved && k < pairs; ++k) {
      cos2[2 * k] = cos2[2 * k + 1] = cos[k];
      sin2[2 * k] = -p.sign * sin[k];
      sin2[2 * k + 1] = p.sign * sin[k];
    }
    const T* x = p.from.as<T>() + row / tokens * p.from.stride(0) + token * p.from.stride(1);
    T* y = p.to.as<T>() + row * heads * head_dim;
    for (int64_t head = 0; head < heads; ++head, x += p.from.stride(2), y += head_dim) {
      if (p.interleaved) {
        turn_neighbours(x, cos2.data(), sin2.data(), 2 * pairs, y);
      } else {
        turn_halves(x, cos, sin, p.sign, pairs, y);
      }
      std::copy(x + 2 * pairs, x + head_dim, y + 2 * pairs);
    }
  }
}

void turn(const Turn& p) {
  visit_float(p.from.dtype, [&]<class T>(T) {
    parallel_rows(p.rows(), p.from.size(2) * p.from.size(3), kGrainElements,
                  [&](int64_t begin, int64_t end, int) { turn_rows<T>(p, begin, end); });
  });
}

void rotary_forward(const ops::RotaryForward& p) { turn({p.input, p.cos, p.sin, p.output, p.interleaved, 1.0f}); }

void rotary_backward(const ops::RotaryBackward& p) {
  turn({p.grad_output, p.cos, p.sin, p.grad_input, p.interleaved, -1.0f});
}

const Registrar<ops::RotaryForward> forward{rotary_forward};
const Registrar<ops::RotaryBackward> backward{rotary_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
