// The loss of a chain field, forward and backward (formulas: ops/chain_field.h).
//
//   A task owns a run of sequences; transitions and their exponentials (8 K^2 bytes) stay in the caches. A step of the
//   forward or backward algorithm is a product of a line of K weights with the K x K exponentials, and K exponentials
//   and logarithms (cpu/chain_moves.h). Limit: K^2 multiplications a token forward, 2 K^2 backward; below some 30 tags
//   the step's chain of dependent instructions, a few hundred cycles.
//
//   Backward: with a = exp(alpha) before a step and q = exp(emissions + B) after it, pair = a_i exp(transition_ij) q_j:
//   the factor of the transition is the same at every step, and left for the end. What is summed is the outer products
//   of a and q, kSteps at a time, so that the (K, K) sum is passed over once for so many. Every task has sums of its
//   own, added in order of the tasks.
#include <vector>

#include "cpu/chain_moves.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

template <class T>
struct Forward {
  const ops::ChainFieldForward& p;
  const Moves& moves;

  void operator()(int64_t begin, int64_t end) const {
    Scratch scratch;
    const auto [line, weights, sums, next, spare] =
        scratch.take(moves.width, moves.width, moves.width, moves.width, moves.width);
    const int32_t* ends = p.cu_seqlens.as<int32_t>();
    for (int64_t s = begin; s < end; ++s) {
      const double log_z = log_partition(ends[s], ends[s + 1], line, weights, sums, next, spare);
      const double right = score(ends[s], ends[s + 1]);
      const bool impossible = right == -INFINITY && log_z == log_z;
      p.losses.as<float>()[s] = impossible ? INFINITY : static_cast<float>(log_z - right);
    }
  }

  double log_partition(int64_t first, int64_t last, float* line, float* weights, float* sums, float* next,
                       float* spare) const {
    if (first == last) return 0.0;
    double taken_off = 0.0;
    fill_line(p.start, moves.width, line);
    for (int64_t t = first; t < last; ++t) {
      if (t > first) {
        exp_line(line, moves.width, weights);
        moves(line, weights, sums, next, spare);
        std::swap(line, next);
        taken_off += moves.largest();
      }
      taken_off += add_and_center(p.emissions.as<T>() + t * p.emissions.stride(0), moves.tags, moves.width, line);
      std::copy_n(line, moves.tags, p.alpha.as<float>() + t * moves.tags);
    }
    const float* final = p.end.as<float>();
    for (int64_t j = 0; j < moves.tags; ++j) line[j] += final[j];
    LogSumExp all;
    all.add(line, moves.tags);
    return taken_off + all.value();
  }

  double score(int64_t first, int64_t last) const {
    if (first == last) return 0.0;
    const int64_t* tags = p.tags.as<int64_t>();
    const float* transition = p.transition.as<float>();
    double total = static_cast<double>(p.start.as<float>()[tags[first]]) + p.end.as<float>()[tags[last - 1]];
    for (int64_t t = first; t < last; ++t) {
      total += widen(p.emissions.as<T>()[t * p.emissions.stride(0) + tags[t]]);
      if (t > first) total += transition[tags[t - 1] * moves.tags + tags[t]];
    }
    return total;
  }
};

// Gradients of the parameters, summed over a run of sequences.
class Sums {
 public:
  static constexpr int64_t kSteps = 8;

  Sums(int64_t tags, int64_t width) : tags_(tags), width_(width) {
    std::tie(pairs, products_, start, end, before_, behind_) =
        std::tuple_cat(memory_.take(tags * width, tags * width, width, width, kSteps * width, kSteps * width));
    for (float* lines : {pairs, products_}) std::fill_n(lines, tags * width, 0.0f);
    for (float* line : {start, end}) std::fill_n(line, width, 0.0f);
  }

  float *pairs, *start, *end;                          // (K, width), (width,): what was added to them as it is
  const float* products() const { return products_; }  // (K, width): what wants the factor of the transition

  // Lines for the next step's weights of the tags before it and behind it; `push` adds their outer product.
  float* before() { return before_ + steps_ * width_; }
  float* behind() { return behind_ + steps_ * width_; }
  void push() {
    if (++steps_ == kSteps) flush();
  }

  void flush() {
    for (int64_t i = 0; i < tags_; ++i) {
      for_vectors(width_, [&](int64_t j, auto vectors) { flush<vectors>(i, j); });
    }
    steps_ = 0;
  }

 private:
  template <int kVectors>
  void flush(int64_t i, int64_t j) {
    float* products = products_ + i * width_ + j;
    F total[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = load(products + v * kLanes);
    for (int64_t step = 0; step < steps_; ++step) {
      const F weight = broadcast(before_[step * width_ + i]);
      const float* behind = behind_ + step * width_ + j;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[v] = total[v] + weight * load(behind + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(products + v * kLanes, total[v]);
  }

  int64_t tags_, width_, steps_ = 0;
  Scratch memory_;
  float *products_, *before_, *behind_;
};

template <class T>
class Backward {
 public:
  Backward(const ops::ChainFieldBackward& params, const Moves& moves, Sums& sums)
      : p_(params), moves_(moves), sums_(sums), tags_(moves.tags), width_(moves.width) {
    std::tie(line_, total_, next_, marginal_, alpha_, spare_) =
        std::tuple_cat(scratch_.take(width_, width_, width_, width_, width_, width_));
  }

  void operator()(int64_t begin, int64_t end) {
    const int32_t* ends = p_.cu_seqlens.as<int32_t>();
    for (int64_t s = begin; s < end; ++s) {
      if (ends[s] < ends[s + 1]) {
        sequence(ends[s], ends[s + 1], p_.grad_losses.as<float>()[s * p_.grad_losses.stride(0)]);
      }
    }
    sums_.flush();
  }

 private:
  void sequence(int64_t first, int64_t last, float upstream) {
    fill_line(p_.end, width_, line_);
    load_alpha(last - 1);
    for_lanes(width_, [&](int64_t j, auto n) { store_n(spare_ + j, load_n(line_ + j, n) + load_n(alpha_ + j, n), n); });
    softmax_line(spare_, width_, marginal_);
    write(last - 1, upstream);
    add(sums_.end);
    for (int64_t t = last - 1; t > first; --t) {
      step(t, upstream);
      write(t - 1, upstream);
    }
    add(sums_.start);
  }

  // From B of token t in line_ to B and the marginals of token t - 1, and the pairs of both.
  void step(int64_t t, float upstream) {
    float *before = sums_.before(), *behind = sums_.behind();
    add_and_center(p_.emissions.as<T>() + t * p_.emissions.stride(0), tags_, width_, line_);
    exp_line(line_, width_, behind);
    moves_(line_, behind, total_, next_, spare_);
    load_alpha(t - 1);
    exp_line(alpha_, width_, before);
    F parts{};
    for_lanes(width_, [&](int64_t i, auto n) { parts = parts + load_n(before + i, n) * load_n(total_ + i, n); });
    const float whole = sum(parts);
    if (whole >= Moves::kSmallestSum) {
      const float scale = 1.0f / whole;
      for_lanes(width_, [&](int64_t i, auto n) {
        store_n(marginal_ + i, load_n(before + i, n) * load_n(total_ + i, n) * scale, n);
        store_n(behind + i, load_n(behind + i, n) * (upstream * scale), n);
      });
      sums_.push();
    } else {
      pairs_exactly(upstream);
    }
    const int64_t* tags = p_.tags.as<int64_t>();
    sums_.pairs[tags[t - 1] * width_ + tags[t]] -= upstream;
    std::swap(line_, next_);
  }

  // The same where all paths that are likely from one side are unlikely from the other: by K^2 exponentials.
  void pairs_exactly(float upstream) {
    for_lanes(width_, [&](int64_t i, auto n) { store_n(spare_ + i, load_n(alpha_ + i, n) + load_n(next_ + i, n), n); });
    const float log_whole = softmax_line(spare_, width_, marginal_) + moves_.largest();
    if (log_whole == -INFINITY) return;
    for (int64_t i = 0; i < tags_; ++i) {
      const float base = alpha_[i] - log_whole;
      float* pairs = sums_.pairs + i * width_;
      for_lanes(width_, [&](int64_t j, auto n) {
        const F pair = exp_of_nonpositive(load_n(moves_.line(i) + j, n) + load_n(line_ + j, n) + base);
        store_n(pairs + j, load_n(pairs + j, n) + pair * upstream, n);
      });
    }
  }

  void load_alpha(int64_t t) {
    std::fill(std::copy_n(p_.alpha.as<float>() + t * tags_, tags_, alpha_), alpha_ + width_, -INFINITY);
  }

  // Turns the marginals into the gradient of a token's emissions.
  void write(int64_t t, float upstream) {
    marginal_[p_.tags.as<int64_t>()[t]] -= 1.0f;
    T* grad = p_.grad_emissions.as<T>() + t * tags_;
    for_lanes(tags_, [&](int64_t j, auto n) {
      const F value = load(marginal_ + j) * upstream;
      store(marginal_ + j, value);
      store_n(grad + j, value, n);
    });
  }

  void add(float* line) const {
    for_lanes(width_, [&](int64_t j, auto n) { store_n(line + j, load_n(line + j, n) + load_n(marginal_ + j, n), n); });
  }

  const ops::ChainFieldBackward& p_;
  const Moves& moves_;
  Sums& sums_;
  const int64_t tags_, width_;
  Scratch scratch_;
  float *line_, *total_, *next_, *marginal_, *alpha_, *spare_;
};

// The sums of all tasks, in their order, and the factor that the products lack.
void add_up(const ops::ChainFieldBackward& p, const std::vector<Sums>& all, const Moves& moves) {
  const int64_t tags = moves.tags, width = moves.width;
  std::vector<float> factors(width), line(width);
  const auto write = [&](float* to, const auto& part) {
    std::fill(line.begin(), line.end(), 0.0f);
    for (const Sums& sums : all) {
      for_lanes(width,
                [&](int64_t j, auto n) { store_n(line.data() + j, load_n(line.data() + j, n) + part(sums, j, n), n); });
    }
    std::copy_n(line.data(), tags, to);
  };
  for (int64_t i = 0; i < tags; ++i) {
    for_lanes(width, [&](int64_t j, auto n) {
      store_n(factors.data() + j, exp_of_nonpositive(load_n(moves.line(i) + j, n) - moves.largest()), n);
    });
    write(p.grad_transition.as<float>() + i * tags, [&](const Sums& sums, int64_t j, auto n) {
      const int64_t at = i * width + j;
      return load_n(sums.products() + at, n) * load_n(factors.data() + j, n) + load_n(sums.pairs + at, n);
    });
  }
  write(p.grad_start.as<float>(), [](const Sums& sums, int64_t j, auto n) { return load_n(sums.start + j, n); });
  write(p.grad_end.as<float>(), [](const Sums& sums, int64_t j, auto n) { return load_n(sums.end + j, n); });
}

void chain_field_forward(const ops::ChainFieldForward& p) {
  ops::check_sequences("chain_field", p, &p.tags);
  const Moves moves(p.transition, true);
  visit_float(p.emissions.dtype, [&]<class T>(T) {
    const Forward<T> kernel{p, moves};
    parallel_sequences(p, [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
  });
  const int64_t inside = p.cu_seqlens.as<int32_t>()[p.sequences()];
  std::fill(p.alpha.as<float>() + inside * p.tag_count(), p.alpha.as<float>() + p.alpha.numel(), -INFINITY);
}

void chain_field_backward(const ops::ChainFieldBackward& p) {
  ops::check_sequences("chain_field backward", p, &p.tags);
  const Moves moves(p.transition, false);
  std::vector<Sums> sums;
  for (int64_t task = 0; task < chain_tasks(p); ++task) sums.emplace_back(moves.tags, moves.width);
  visit_float(p.emissions.dtype, [&]<class T>(T) {
    parallel_sequences(
        p, [&](int64_t task, int64_t begin, int64_t end) { Backward<T>(p, moves, sums[task])(begin, end); });
    const int64_t inside = p.cu_seqlens.as<int32_t>()[p.sequences()];
    T* grad = p.grad_emissions.as<T>();
    std::fill(grad + inside * p.tag_count(), grad + p.grad_emissions.numel(), T{});
  });
  add_up(p, sums, moves);
}

const Registrar<ops::ChainFieldForward> forward{chain_field_forward};
const Registrar<ops::ChainFieldBackward> backward{chain_field_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
