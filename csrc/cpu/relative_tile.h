// Relative attention's part in a tile of scores: positions, segments, and who sees whom (formulas:
// ops/relative_attention.h, tiles: cpu/attention_tile.h).
//
//   Row i needs its products with the distances p_i - j of the tile's keys j, which lie side by side, so that of a
//   stripe of rows whose positions span s all are found among keys + s distances:
//
//               distances ->                              A stripe's products are one small matrix product with the
//        row 0  . . x x x x x x x x      key c is         position keys of those distances, as they lie: no position is
//        row 1  . x x x x x x x x .      distance         shifted or copied. Stripes are kStripe rows, or fewer where
//        row 2  x x x x x x x x . .      p_i - key - c    their positions (query_positions, in any order) lie apart.
//
//   From row i on the products of its keys lie backwards; blocks of kLanes rows and keys are turned round in registers
//   and added to the tile, whose lanes are rows. The backward goes the same way from the tile to the stripes:
//
//     grad_position_query of a stripe += stripe r,    grad_r of its distances += stripe^T position_query
//
//   Rows that follow each other waste kStripe - 1 of kKeys + kStripe - 1 distances.
#pragma once

#include <memory>
#include <vector>

#include "cpu/attention_rows.h"
#include "cpu/parallel.h"
#include "ops/relative_attention.h"

namespace llmengine::cpu::LLMENGINE_ISA {

inline constexpr int64_t kStripe = kTileRows;
inline constexpr int64_t kSpan = 96;             // of the positions in a stripe of more than one row, at most
inline constexpr int64_t kBand = kKeys + kSpan;  // distances of a stripe, at most

// The position keys of all distances that any tile of a call meets, as floats: the rows, and transposed. Distances that
// position_key does not cover (which no row sees) are zero. The transpose is cut into chunks that overlap, so that all
// distances of a stripe lie in one: in one matrix, each of its rows would lie on a page of its own.
class PositionKeys {
 public:
  PositionKeys(const ops::RelativeAttentionOptions& p, const std::vector<ops::Sequence>& sequences)
      : p_(p), depth_(p.position_key.size(3)), width_(padded(depth_)) {
    ops::Distances all{0, -1};
    for (const ops::Sequence& s : sequences) {
      if (!s.rows || !s.keys) continue;
      const ops::Distances d = ops::distances_of(p, s, 0, s.rows);
      all = all.first > all.last ? d : ops::Distances{std::min(all.first, d.first), std::max(all.last, d.last)};
    }
    first_ = all.first - kLanes;  // tiles of keys are filled up to whole vectors
    chunks_ = all.first > all.last ? 0 : count_of(all.last - first_ + 1, kStep);
    count_ = chunks_ * kStep + kBand;
  }

  template <class T>
  void pack() {
    const int64_t heads = p_.heads(), blocks = count_of(count_, kStep);
    rows_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(heads * count_ * width_));
    transposed_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(heads * chunks_ * depth_ * kChunk));
    parallel_each(heads * blocks, [&](int64_t task) {
      const int64_t block = task % blocks * kStep;
      pack_rows_of<T>(task / blocks, block, std::min(count_, block + kStep));
    });
    parallel_each(heads * chunks_, [&](int64_t task) { transpose_chunk(task / chunks_, task % chunks_); });
  }

  // Element (k, distance - this one) at k kChunk.
  const float* transposed(int64_t head, int64_t distance) const {
    const int64_t place = distance - first_, chunk = place / kStep;
    return transposed_.get() + (head * chunks_ + chunk) * depth_ * kChunk + place % kStep;
  }
  const float* row(int64_t head, int64_t distance) const {
    return rows_.get() + (head * count_ + distance - first_) * width_;
  }

  static constexpr int64_t kStep = 192, kChunk = kStep + kBand;

 private:
  template <class T>
  void pack_rows_of(int64_t head, int64_t begin, int64_t end) {
    const Rows<const T> from(p_.position_key, 0, head, 0);
    for (int64_t c = begin; c < end; ++c) {
      float* to = rows_.get() + (head * count_ + c) * width_;
      const int64_t place = first_ + c + p_.zero_distance;
      if (place >= 0 && place < p_.distances()) {
        pack_rows(from.row(place), from.stride, 1, depth_, to, width_);
      } else {
        std::fill_n(to, width_, 0.0f);
      }
    }
  }

  void transpose_chunk(int64_t head, int64_t chunk) {
    const float* from = row(head, first_ + chunk * kStep);
    float* to = transposed_.get() + (head * chunks_ + chunk) * depth_ * kChunk;
    for (int64_t c = 0; c < kChunk; c += kLanes) {
      for (int64_t k = 0; k < depth_; k += kLanes) {
        F lines[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) lines[i] = load(from + (c + i) * width_ + k);
        transpose(lines);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, depth_ - k); ++i) store(to + (k + i) * kChunk + c, lines[i]);
      }
    }
  }

  const ops::RelativeAttentionOptions& p_;
  int64_t depth_, width_, first_, chunks_, count_;
  std::unique_ptr<float[]> rows_, transposed_;
};

struct SegmentSums {
  F grad_same[kRows / kLanes] = {}, grad_other[kRows / kLanes] = {};
  F p_same[kRows / kLanes] = {}, p_other[kRows / kLanes] = {};
};

// One head of one sequence, open for kRows rows from `row` on. Like Scores.
class RelativeScores {
 public:
  template <class T>
  RelativeScores(const ops::RelativeAttentionOptions& p, const ops::Sequence& s, int64_t head, int64_t row,
                 const PositionKeys& keys, Scratch& scratch, T)
      : p_(p),
        s_(s),
        head_(head),
        row_(row),
        rows_(std::min(kRows, s.rows - row)),
        depth_(p.query.size(3)),
        width_(padded(depth_)),
        scale_(static_cast<float>(p.scale)),
        keys_(keys),
        dropout_(p, s, head) {
    // the micro-kernel reads whole stripes of its own, and whole columns of them
    const auto [query, products] = scratch.take((kRows + kTileRows) * width_, (kRows + kTileRows) * kBand + kBand);
    query_ = query, products_ = products;
    const Rows<const T> rows(p.position_query, 0, head, s.row0 + row);
    pack_rows(rows.data, rows.stride, rows_, rows.columns, query_, width_);
    for (int64_t r = 0; r < kRows; ++r) place_[r] = static_cast<int32_t>(p.position(s, row + std::min(r, rows_ - 1)));
    cut_stripes();
    if (p.segment_scores.defined()) read_segments();
    if (p.query_ranks.defined()) read_ranks();
  }

  Span keys(int64_t, int64_t) const {
    if (!p_.is_causal) return {0, s_.keys};
    return {0, ops::clamp_index(*std::max_element(place_, place_ + rows_) + int64_t{1}, 0, s_.keys)};
  }
  TilePlace place(int64_t row, int64_t rows, int64_t key, int64_t keys, int64_t stripe) const {
    return {row, rows, key, keys, stripe, nullptr};
  }
  bool capped() const { return false; }
  bool drops() const { return dropout_.drops(); }
  void keep_multipliers(const TilePlace& at, float* keep) const { dropout_.keep_multipliers(at, keep); }

  void to_logits(const TilePlace& at, float* tile, float* = nullptr) const {
    const int64_t stride = products_stride(at);
    for (const Stripe& stripe : stripes_) {
      multiply<Lies::along, Into::times>(kTileVectors, stripe.rows, count_of(band(at, stripe), kLanes), depth_,
                                         query_ + stripe.row * width_, width_,
                                         keys_.transposed(head_, first_distance(at, stripe)), PositionKeys::kChunk,
                                         kTileVectors * kLanes, products_ + stripe.row * stride, stride, &scale_);
    }
    for_blocks(at, stride, [&](int64_t r, int64_t c, float* const* products) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[kLanes - 1 - i] = load(products[kLanes - 1 - i]);
      transpose(block);  // block[kLanes - 1 - i]: key c + i
      for (int i = 0; i < kLanes; ++i) {
        float* x = tile + (c + i) * kRows + r;
        store(x, load(x) + block[kLanes - 1 - i]);
      }
    });
    if (p_.segment_scores.defined()) add_segments(at, tile);
    if (p_.query_ranks.defined() || p_.is_causal) hide(at, tile);
  }

  // ---- backward: `grad`, a tile of gradients of the logits; what is added to below lacks the factor scale ----

  // grad_query: (kRows, padded head_dim). grad_distances: of this sequence, from `first` on, (.., padded head_dim).
  void accumulate_positions(const TilePlace& at, const float* grad, float* grad_query, float* grad_distances,
                            int64_t first) const {
    const int64_t stride = products_stride(at), panel = kTileVectors * kLanes;
    std::fill_n(products_, (rows_ + kTileRows) * stride, 0.0f);
    for_blocks(at, stride, [&](int64_t r, int64_t c, float* const* products) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[kLanes - 1 - i] = c + i < at.keys ? load(grad + (c + i) * kRows + r) : F{};
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows_ - r); ++i) store(products[i], block[i]);
    });
    for (const Stripe& stripe : stripes_) {
      const int64_t distance = first_distance(at, stripe), count = band(at, stripe);
      const float* products = products_ + stripe.row * stride;
      multiply<Lies::along, Into::add>(kTileVectors, stripe.rows, width_ / kLanes, count, products, stride,
                                       keys_.row(head_, distance), width_, panel, grad_query + stripe.row * width_,
                                       width_);
      multiply<Lies::across, Into::add>(kTileVectors, count, width_ / kLanes, stripe.rows, products, stride,
                                        query_ + stripe.row * width_, width_, panel,
                                        grad_distances + (distance - first) * width_, width_);
    }
  }

  // Adds a tile's part in the sums of rows over the keys of their own segment, and of other segments.
  void accumulate_segments(const TilePlace& at, const float* probabilities, const float* grad,
                           SegmentSums& sums) const {
    for (int64_t v = 0; v < at.vectors(); ++v) {
      F grad_same = {}, grad_other = {}, p_same = {}, p_other = {};
      for (int64_t c = 0; c < at.keys; ++c) {
        const I own = segments_[v] == key_segment(at, c);
        const int64_t score = c * kRows + v * kLanes;
        const F g = load(grad + score), p = load(probabilities + score);
        grad_same += select(own, g, F{});
        grad_other += select(own, F{}, g);
        p_same += select(own, p, F{});
        p_other += select(own, F{}, p);
      }
      sums.grad_same[v] += grad_same, sums.grad_other[v] += grad_other;
      sums.p_same[v] += p_same, sums.p_other[v] += p_other;
    }
  }

  // The gradients of the logits of a row add up to grad_lse. What they miss of it is the rounding of delta, which each
  // took with it in proportion to its probability: here, where they are all there is, it is given back.
  void store_segments(const SegmentSums& sums, const TensorView& grad_lse, const TensorView& grad) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t v = r / kLanes, lane = r % kLanes, row = s_.row0 + row_ + r;
      const float p_same = sums.p_same[v][lane], p = p_same + sums.p_other[v][lane];
      float same = sums.grad_same[v][lane], other = sums.grad_other[v][lane];
      if (p > 0.0f) {
        const float whole = grad_lse.defined() ? grad_lse.as<float>()[head_ * p_.query.size(2) + row] : 0.0f;
        const float missing = whole - (same + other), share = missing * (p_same / p);
        same += share, other += missing - share;
      }
      float* out = grad.as<float>() + (row * p_.heads() + head_) * 2;
      out[0] = same * scale_, out[1] = other * scale_;
    }
  }

 private:
  struct Stripe {
    int64_t row, rows;
    int32_t least, most;  // of the positions
  };

  void cut_stripes() {
    for (int64_t r = 0; r < rows_; ++r) {
      const int32_t place = place_[r];
      if (!stripes_.empty() && stripes_.back().rows < kStripe) {
        Stripe& last = stripes_.back();
        const int32_t least = std::min(last.least, place), most = std::max(last.most, place);
        if (int64_t{most} - least <= kSpan - kLanes) {
          last = {last.row, last.rows + 1, least, most};
          continue;
        }
      }
      stripes_.push_back({r, 1, place, place});
    }
  }

  // A tile's keys are filled up to whole vectors. The last of them has a stripe's first distance.
  static int64_t first_distance(const TilePlace& at, const Stripe& s) {
    return s.least - (at.key + round_up(at.keys, kLanes) - 1);
  }
  static int64_t band(const TilePlace& at, const Stripe& s) { return round_up(at.keys, kLanes) + s.most - s.least; }
  int64_t products_stride(const TilePlace& at) const {
    int64_t widest = 0;
    for (const Stripe& s : stripes_) widest = std::max(widest, band(at, s));
    return round_up(widest, kLanes);
  }

  // Calls body(r, c, products) for the blocks of kLanes rows and keys from (r, c) on: products[i] points to row r + i's
  // product with key c + kLanes - 1, which those with the keys before it follow.
  template <class Body>
  void for_blocks(const TilePlace& at, int64_t stride, const Body& body) const {
    int64_t offsets[kRows];  // of each row's product with the last key
    for (const Stripe& s : stripes_) {
      for (int64_t r = s.row; r < s.row + s.rows; ++r) offsets[r] = r * stride + place_[r] - s.least;
    }
    const int64_t keys = round_up(at.keys, kLanes);
    for (int64_t r = 0; r < rows_; r += kLanes) {
      for (int64_t c = 0; c < keys; c += kLanes) {
        float* products[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          products[i] = products_ + offsets[std::min(r + i, rows_ - 1)] + keys - kLanes - c;
        }
        body(r, c, products);
      }
    }
  }

  // ---- segments and sight ----

  int32_t key_segment(const TilePlace& at, int64_t c) const {
    return p_.key_segments.as<int32_t>()[s_.key0 + at.key + c];
  }

  void read_segments() {
    const float* scores = p_.segment_scores.as<float>();
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t token = s_.row0 + row_ + std::min(r, rows_ - 1), score = (token * p_.heads() + head_) * 2;
      segments_[r / kLanes][r % kLanes] = p_.query_segments.as<int32_t>()[token];
      same_[r] = scores[score] * scale_, other_[r] = scores[score + 1] * scale_;
    }
  }
  void add_segments(const TilePlace& at, float* tile) const {
    for_scores(at, tile, [&](int64_t v, int64_t c, float* x) {
      const I own = segments_[v] == key_segment(at, c);
      store(x, load(x) + select(own, load(same_ + v * kLanes), load(other_ + v * kLanes)));
    });
  }

  void read_ranks() {
    for (int64_t r = 0; r < kRows; ++r) {
      ranks_[r / kLanes][r % kLanes] = p_.query_ranks.as<int32_t>()[s_.row0 + row_ + std::min(r, rows_ - 1)];
    }
  }
  void hide(const TilePlace& at, float* tile) const {
    const int32_t* key_ranks = p_.key_ranks.defined() ? p_.key_ranks.as<int32_t>() + s_.key0 + at.key : nullptr;
    for_scores(at, tile, [&](int64_t v, int64_t c, float* x) {
      const int32_t key = static_cast<int32_t>(at.key + c);
      I place;
      std::memcpy(&place, place_ + v * kLanes, sizeof place);
      I seen = I{} == I{};
      if (key_ranks) {
        seen = ranks_[v] > key_ranks[c];
        if (p_.include_self) seen |= place == key;
      }
      if (p_.is_causal) seen &= place >= key;
      store(x, select(seen, load(x), broadcast(-INFINITY)));
    });
  }

  const ops::RelativeAttentionOptions& p_;
  const ops::Sequence& s_;
  int64_t head_, row_, rows_, depth_, width_;
  float scale_;
  const PositionKeys& keys_;
  Scores dropout_;
  float *query_, *products_;
  std::vector<Stripe> stripes_;
  alignas(64) int32_t place_[kRows];  // lanes beyond the last row are like it
  alignas(64) float same_[kRows], other_[kRows];
  I segments_[kRows / kLanes], ranks_[kRows / kLanes];
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
