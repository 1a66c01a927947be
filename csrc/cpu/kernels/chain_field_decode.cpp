// The best tags of a chain field, by Viterbi's algorithm (formulas: ops/chain_field.h).
//
//   A task owns a run of sequences; a step compares K predecessors of all K tags, a vector of tags at a time, and keeps
//   for each the index of the best. Limit: K^2 additions, comparisons and selections a token.
#include <vector>

#include "cpu/chain_moves.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

bool is_score(const TensorView& numbers) {
  const float* x = numbers.as<float>();
  return std::all_of(x, x + numbers.numel(), [](float value) { return value < INFINITY; });
}

template <class T>
class Decoder {
 public:
  explicit Decoder(const ops::ChainFieldDecode& p)
      : p_(p),
        tags_(p.tag_count()),
        width_(round_up(tags_, kLanes)),
        ends_are_scores_(is_score(p.start) && is_score(p.end)),
        moves_are_scores_(is_score(p.transition)),
        transition_(tags_ * width_, -INFINITY) {
    for (int64_t i = 0; i < tags_; ++i) {
      std::copy_n(p.transition.as<float>() + i * tags_, tags_, transition_.data() + i * width_);
    }
  }

  void operator()(int64_t begin, int64_t end) const {
    const int32_t* ends = p_.cu_seqlens.as<int32_t>();
    Scratch scratch;
    std::vector<int32_t> from;  // of each token and tag but the first token's: the best tag before it
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = ends[s], length = ends[s + 1] - first;
      from.resize(std::max<int64_t>(from.size(), length * width_));
      p_.scores.as<float>()[s] = length ? sequence(first, length, scratch, from.data()) : 0.0f;
    }
  }

 private:
  float sequence(int64_t first, int64_t length, Scratch& scratch, int32_t* from) const {
    auto [best, next] = scratch.take(width_, width_);
    int64_t* tags = p_.tags.as<int64_t>() + first;
    bool scores = ends_are_scores_ && (length == 1 || moves_are_scores_);
    fill_line(p_.start, width_, best);
    for (int64_t t = 0; t < length; ++t) {
      if (t > 0) {
        for_vectors(width_, [&](int64_t j, auto vectors) { move<vectors>(best, j, next + j, from + t * width_ + j); });
        std::swap(best, next);
      }
      scores &= add(p_.emissions.as<T>() + (first + t) * p_.emissions.stride(0), best);
    }
    const float* end = p_.end.as<float>();
    for (int64_t j = 0; j < tags_; ++j) best[j] += end[j];
    int64_t tag = std::max_element(best, best + tags_) - best;  // the first of the largest
    const float score = scores ? best[tag] : NAN;
    const bool found = score - score == 0.0f;
    for (int64_t t = length - 1; t >= 0; --t) {
      tags[t] = found ? tag : -1;
      if (t > 0) tag = from[t * width_ + tag];
    }
    return score;
  }

  // For the tags of some vectors, from j: the best predecessor's score with the transition, and who it is.
  template <int kVectors>
  void move(const float* best, int64_t j, float* score, int32_t* from) const {
    const float* transition = transition_.data() + j;
    F most[kVectors];
    I who[kVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) most[v] = broadcast(best[0]) + load(transition + v * kLanes);
    for (int64_t i = 1; i < tags_; ++i) {
      const F before = broadcast(best[i]);
      const I index = I{} + static_cast<int32_t>(i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F other = before + load(transition + i * width_ + v * kLanes);
        const I better = other > most[v];
        most[v] = select(better, other, most[v]);
        who[v] = better ? index : who[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(score + v * kLanes, most[v]);
      std::memcpy(from + v * kLanes, &who[v], sizeof who[v]);
    }
  }

  // best += emissions of a token; false where one of them is NaN or +inf.
  bool add(const T* emissions, float* best) const {
    I all = ~I{};
    for_lanes(tags_, [&](int64_t j, auto n) {
      const F x = load_n(emissions + j, n, -INFINITY);
      all = all & (x < INFINITY);
      store(best + j, load(best + j) + x);
    });
    return reduce_max(select(all, F{}, broadcast(1.0f))) == 0.0f;
  }

  const ops::ChainFieldDecode& p_;
  const int64_t tags_, width_;
  const bool ends_are_scores_, moves_are_scores_;
  std::vector<float> transition_;  // (K, width)
};

void chain_field_decode(const ops::ChainFieldDecode& p) {
  ops::check_sequences("chain_field decoding", p, nullptr);
  visit_float(p.emissions.dtype, [&]<class T>(T) {
    const Decoder<T> kernel(p);
    parallel_sequences(p, [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
  });
  const int64_t inside = p.cu_seqlens.as<int32_t>()[p.sequences()];
  std::fill(p.tags.as<int64_t>() + inside, p.tags.as<int64_t>() + p.tokens(), -1);
}

const Registrar<ops::ChainFieldDecode> decode{chain_field_decode};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
