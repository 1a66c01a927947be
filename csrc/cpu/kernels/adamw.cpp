// One step of AdamW over a list of parameters (formulas: ops/adamw.h).
//
//   The elements of all parameters are cut into blocks, the blocks dealt out in tasks, so that threads share large
//   parameters and a small one costs no call. Each element is read and written once; no block depends on how many
//   threads there are, nor does any bit of the result.
//   Limit: memory bandwidth. Parameter, gradient and both moments in float: 16 bytes read, 12 written; bfloat16 with
//   float moments and masters: 16 and 14; all bfloat16: 8 and 6. About 15 flops, a division and a root an element, and
//   with stochastic rounding a tenth of a vector's Philox draw, hide behind it.
#include "ops/adamw.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/philox_block.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kBlock = 1 << 12;         // elements
constexpr int64_t kBlocksPerTask = 1 << 4;  // worth a thread's while

// Random words of kRowDraws elements.
struct Noise {
  uint32_t word[kRowDraws];

  U low(int64_t i) const { return at(i) & 0xffff; }
  U high(int64_t i) const { return at(i) >> 16; }

 private:
  U at(int64_t i) const {  // i: a multiple of kLanes
    U words;
    std::memcpy(&words, word + i, sizeof words);
    return words;
  }
};

// Stores x rounded to either neighbour, up with the probability that noise / 2^16 is what x has beyond the lower one.
template <class Count>
void store_stochastic(bf16* to, F x, U noise, Count n) {
  const U u = __builtin_bit_cast(U, x);
  const U infinite = U{} + 0x7f800000u;
  const U kept = (u & infinite) == infinite ? ((x != x) ? U{} + 0x7fc00000u : u) : u + noise;
  const H h = __builtin_convertvector(kept >> 16, H);
  std::memcpy(to, &h, static_cast<size_t>(static_cast<int>(n)) * sizeof(bf16));
}

// a + rest (b - a), from the nearer end: where b is all that counts, nothing of it is lost beside a large a.
struct Lerp {
  bool from_a;
  float way;

  explicit Lerp(double rest) : from_a(rest < 0.5), way(static_cast<float>(from_a ? rest : rest - 1.0)) {}

  F operator()(F a, F b) const { return (from_a ? a : b) + (b - a) * way; }
};

// What a step does to every element of one parameter.
struct Rule {
  Lerp mean;
  float scale, keep, beta2, beta2_rest, rate, root, eps;
  int64_t row;

  Rule(const ops::AdamW& p, size_t i) : mean(1.0 - p.beta1) {
    const double t = static_cast<double>(*p.steps[i].as<float>()) + 1.0;
    const double lr = p.lr.dtype == DType::f64 ? *p.lr.as<double>() : static_cast<double>(*p.lr.as<float>());
    const float multiplier = p.multiplier.defined() ? *p.multiplier.as<float>() : 1.0f;
    scale = p.maximize ? -multiplier : multiplier;
    keep = static_cast<float>(1.0 - lr * p.weight_decay);
    beta2 = static_cast<float>(p.beta2);
    beta2_rest = static_cast<float>(1.0 - p.beta2);
    rate = static_cast<float>(lr / (1.0 - std::pow(p.beta1, t)));
    root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(p.beta2, t)));
    eps = static_cast<float>(p.eps);
    row = static_cast<int64_t>((static_cast<uint64_t>(static_cast<int64_t>(t)) << 32) +
                               static_cast<uint64_t>(p.numbers[i]));
  }
};

// W: of the parameter, G: of the gradient, M: of the moments.
template <class W, class G, class M, bool stochastic>
struct Update {
  const ops::AdamW& p;
  const Rule& rule;
  size_t i;
  W* parameter = p.parameters[i].as<W>();
  const G* gradient = p.gradients[i].as<G>();
  M *exp_avg = p.exp_avgs[i].as<M>(), *exp_avg_sq = p.exp_avg_sqs[i].as<M>();
  M* peak = p.max_exp_avg_sqs.empty() ? nullptr : p.max_exp_avg_sqs[i].as<M>();
  float* master = p.masters.empty() ? nullptr : p.masters[i].as<float>();

  void operator()(int64_t begin, int64_t end) const {
    if constexpr (!stochastic)
      return run(begin, end - begin, [](auto* to, F x, auto, int64_t, auto n) { store_n(to, x, n); });
    for (int64_t first = begin; first < end; first += kRowDraws) {
      Noise weight_and_m, v_and_peak;
      row_draws(static_cast<uint64_t>(p.seed), 0, rule.row, first, weight_and_m.word);
      if (!std::is_same_v<M, float>) {
        row_draws(static_cast<uint64_t>(p.seed), 1, rule.row, first, v_and_peak.word);
      }
      run(first, std::min<int64_t>(kRowDraws, end - first), [&](auto* to, F x, Part part, int64_t c, auto n) {
        if constexpr (std::is_same_v<decltype(to), float*>) {
          store_n(to, x, n);
        } else {
          const Noise& noise = part == kWeight || part == kMean ? weight_and_m : v_and_peak;
          store_stochastic(to, x, part == kWeight || part == kSquare ? noise.low(c) : noise.high(c), n);
        }
      });
    }
  }

 private:
  enum Part { kWeight, kMean, kSquare, kPeak };

  // Elements [first, first + elements); store(to, x, part, place in the run, count).
  template <class Store>
  void run(int64_t first, int64_t elements, const Store& store) const {
    for_lanes(elements, [&](int64_t c, auto n) {
      const int64_t at = first + c;
      const F g = load_n(gradient + at, n) * rule.scale;
      F m = load_n(exp_avg + at, n), v = load_n(exp_avg_sq + at, n);
      m = rule.mean(m, g);
      v = v * rule.beta2 + g * g * rule.beta2_rest;
      store(exp_avg + at, m, kMean, c, n);
      store(exp_avg_sq + at, v, kSquare, c, n);
      if (peak) {
        const F before = load_n(peak + at, n);
        v = select((before > v) | (before != before), before, v);  // NaN stays, as in torch.maximum
        store(peak + at, v, kPeak, c, n);
      }
      F w = master ? load_n(master + at, n) : load_n(parameter + at, n);
      w = w * rule.keep - m * rule.rate / (sqrt(v) * rule.root + rule.eps);
      if (master) {
        store_n(master + at, w, n);
        store_n(parameter + at, w, n);
      } else {
        store(parameter + at, w, kWeight, c, n);
      }
    });
  }
};

template <class W, class G, class M, bool stochastic>
void step(const ops::AdamW& p) {
  const size_t count = p.parameters.size();
  std::vector<Rule> rules;
  std::vector<int64_t> blocks(count + 1, 0);  // before each parameter
  for (size_t i = 0; i < count; ++i) {
    rules.emplace_back(p, i);
    blocks[i + 1] = blocks[i] + (p.parameters[i].numel() + kBlock - 1) / kBlock;
  }
  parallel_each((blocks[count] + kBlocksPerTask - 1) / kBlocksPerTask, [&](int64_t task) {
    int64_t block = task * kBlocksPerTask;
    const int64_t last = std::min(block + kBlocksPerTask, blocks[count]);
    while (block < last) {
      const auto next = std::upper_bound(blocks.begin(), blocks.end(), block);  // the first that begins later
      const size_t i = static_cast<size_t>(next - blocks.begin()) - 1;
      const int64_t stop = std::min(last, *next);
      Update<W, G, M, stochastic>{p, rules[i], i}((block - blocks[i]) * kBlock,
                                                  std::min((stop - blocks[i]) * kBlock, p.parameters[i].numel()));
      block = stop;
    }
  });
  for (const TensorView& t : p.steps) *t.as<float>() += 1.0f;
}

void adamw(const ops::AdamW& p) {
  if (p.parameters.empty() || (p.found_inf.defined() && *p.found_inf.as<float>() != 0.0f)) return;
  visit_float(p.parameters[0].dtype, [&]<class W>(W) {
    visit_float(p.exp_avgs[0].dtype, [&]<class M>(M) {
      const auto of_gradients = [&]<class G>(G) {
        if (std::is_same_v<W, float> && std::is_same_v<M, float>) return step<W, G, M, false>(p);
        p.stochastic ? step<W, G, M, true>(p) : step<W, G, M, false>(p);
      };
      p.gradients[0].dtype == DType::f32 ? of_gradients(float{}) : of_gradients(W{});
    });
  });
}

const Registrar<ops::AdamW> registered{adamw};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
