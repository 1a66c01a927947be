// What happens to a tile of rows, the same for attention and for relative attention: the forward's online softmax, and
// the backward's tiles. They differ in what makes logits of query key^T, which is up to `Scores`:
//
//   first_key(row), last_key(row_end)    the keys that rows [row, row_end) may see, from a multiple of 4 on
//   to_logits(at, tile, slope)           products become logits; slope receives the derivative of a soft cap
//   capped(), drops(), keep_multipliers(at, keep)
//
// (cpu/attention_tile.h has attention's.) Params: the forward's or the backward's of either operator.
#pragma once

#include <tuple>

#include "cpu/attention_tile.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

// Of each row: the largest logit so far, the sum of exp(logit - largest), and what the last tile scaled both by.
struct Statistics {
  alignas(64) float largest[kRows], total[kRows], beta[kRows];

  Statistics() {
    std::fill_n(largest, kRows, -INFINITY);
    std::fill_n(total, kRows, 0.0f);
  }

  // Logits become exponentials.
  void update(const TilePlace& at, float* tile) {
    for (int64_t v = 0; v < at.vectors(); ++v) {
      const int64_t lane = v * kLanes;
      const F before = load(largest + lane);
      F most = before;
      for (int64_t c = 0; c < at.keys; ++c) most = max(most, load(tile + c * kRows + lane));
      const F shift = select(most == -INFINITY, F{}, most);
      F sum = {};
      for (int64_t c = 0; c < at.keys; ++c) {
        float* x = tile + c * kRows + lane;
        const F e = exp_of_nonpositive(load(x) - shift);
        store(x, e);
        sum += e;
      }
      const F scale = exp_of_nonpositive(before - shift);
      store(beta + lane, scale);
      store(total + lane, load(total + lane) * scale + sum);
      store(largest + lane, most);
    }
  }
};

// kRows rows of one head, from `row` on. `scores`: of that head, and open for these rows.
template <class T, class Params, class Scores>
void forward_rows(const Params& p, const ops::Sequence& s, int64_t head, int64_t row, const Scores& scores) {
  const int64_t rows = std::min(kRows, s.rows - row), key_head = head / p.group();
  const Rows<const T> query(p.query, s.batch, head, s.row0 + row);
  const Rows<const T> key(p.key, s.batch, key_head, s.key0), value(p.value, s.batch, key_head, s.key0);
  const int64_t depth = query.columns, width = padded(value.columns);
  const float scale = static_cast<float>(p.scale);

  thread_local Scratch scratch;
  const auto [transposed, keys, values, tile, keep, output] = scratch.take(
      depth * kRows, padded(depth) * kKeys, width * kKeys, kTile, scores.drops() ? kTile : 0, width * kRows);
  pack_transposed(query.data, query.stride, rows, depth, transposed);
  std::fill_n(output, width * rows, 0.0f);
  Statistics statistics;
  const int64_t end = scores.last_key(row + rows);
  for (int64_t first = scores.first_key(row); first < end; first += kKeys) {
    const TilePlace at{row, rows, first, std::min(kKeys, end - first)};
    multiply_scores(lie_or_pack(key, first, at.keys, keys), at.keys, depth, scale, transposed, rows, tile);
    scores.to_logits(at, tile);
    statistics.update(at, tile);
    if (scores.drops()) {
      scores.keep_multipliers(at, keep);
      for_scores(at, tile, [&](int64_t, int64_t, float* x) { store(x, load(x) * load(keep + (x - tile))); });
    }
    const Floats packed = pack(value, first, at.keys, values);
    multiply<Lies::across, Into::scaled>(kTileVectors, rows, width / kLanes, at.keys, tile, kRows, packed.data,
                                         packed.stride, kTileVectors * kLanes, output, width, statistics.beta);
  }

  const Rows<T> out(p.output, s.batch, head, s.row0 + row);
  const int64_t statistic = (s.batch * p.heads() + head) * p.query.size(2) + s.row0 + row;
  for (int64_t r = 0; r < rows; ++r) {
    const float total = statistics.total[r];
    const float* line = output + r * width;
    for_lanes(out.columns,
              [&](int64_t c, auto n) { store_n(out.row(r) + c, total == 0.0f ? F{} : load(line + c) / total, n); });
    const double lse = std::log(static_cast<double>(total)) + (total == 0.0f ? 0.0 : statistics.largest[r]);
    const float high = static_cast<float>(lse);
    p.lse.template as<float>()[statistic + r] = high;
    p.lse_low.template as<float>()[statistic + r] = std::isinf(high) ? 0.0f : static_cast<float>(lse - high);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What one task works with: the key head's operands and buffers for a row tile and for its tiles of scores.
template <class T, class Params>
class Workspace {
 public:
  Workspace(const Params& p, const ops::Sequence& s, int64_t key_head, Scratch& scratch)
      : p_(p),
        s_(s),
        key_(p.key, s.batch, key_head, s.key0),
        value_(p.value, s.batch, key_head, s.key0),
        depth_(padded(key_.columns)),
        width_(padded(value_.columns)) {
    const int64_t drops = p.dropout_p > 0 ? kTile : 0, capped = p.softcap > 0 ? kTile : 0;
    const auto buffers =
        scratch.take(key_.columns * kRows, value_.columns * kRows, value_.columns * kRows, depth_ * kRows,
                     width_ * kRows, depth_ * kKeys, width_ * kKeys, kTile, kTile, drops, capped, depth_ * kRows);
    std::tie(query_transposed_, grad_transposed_, output_transposed_, query_, grad_, keys_, values_, p_tile_, g_tile_,
             keep_, slope_, grad_query_) = std::tuple_cat(buffers);
  }

  int64_t depth() const { return depth_; }
  int64_t width() const { return width_; }
  const float* p_tile() const { return p_tile_; }  // P keep
  const float* g_tile() const { return g_tile_; }

  void open_rows(int64_t head, int64_t row) {
    const int64_t rows = std::min(kRows, s_.rows - row);
    const Rows<const T> query(p_.query, s_.batch, head, s_.row0 + row);
    const Rows<const T> grad(p_.grad_output, s_.batch, head, s_.row0 + row);
    const Rows<const T> output(p_.output, s_.batch, head, s_.row0 + row);
    pack_transposed(query.data, query.stride, rows, query.columns, query_transposed_);
    pack_transposed(grad.data, grad.stride, rows, grad.columns, grad_transposed_);
    pack(query, 0, rows, query_);
    pack(grad, 0, rows, grad_);
    pack_transposed(output.data, output.stride, rows, output.columns, output_transposed_);
    make_delta(rows);
    const int64_t statistic = (s_.batch * p_.heads() + head) * p_.query.size(2) + s_.row0 + row;
    std::fill_n(lse_, kRows, INFINITY);  // of lanes without a row: their probabilities are 0
    std::fill_n(lse_low_, kRows, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const float lse = p_.lse.template as<float>()[statistic + r];
      lse_[r] = lse == -INFINITY ? 0.0f : lse;
      lse_low_[r] = p_.lse_low.template as<float>()[statistic + r];
      if (p_.grad_lse.defined()) delta_[r] -= p_.grad_lse.template as<float>()[statistic + r];
    }
  }

  // P keep and P (grad_P keep - delta), the gradient of the logits
  template <class Scores>
  void make_tiles(const Scores& scores, const TilePlace& at) {
    at_ = at;
    multiply_scores(lie_or_pack(value_, at.key, at.keys, values_), at.keys, value_.columns, 1.0f, grad_transposed_,
                    at.rows, g_tile_);
    packed_key_ = pack(key_, at.key, at.keys, keys_);
    multiply_scores(packed_key_, at.keys, key_.columns, static_cast<float>(p_.scale), query_transposed_, at.rows,
                    p_tile_);
    scores.to_logits(at, p_tile_, slope_);
    if (scores.drops()) scores.keep_multipliers(at, keep_);
    for_scores(at, p_tile_, [&](int64_t v, int64_t, float* x) {
      const int64_t offset = x - p_tile_, lane = v * kLanes;
      const F probability = exp_of_nonpositive(load(x) - load(lse_ + lane) - load(lse_low_ + lane));
      F kept = probability, grad = load(g_tile_ + offset);
      if (scores.drops()) {
        const F keep = load(keep_ + offset);
        kept = probability * keep;
        grad = grad * keep;
      }
      store(x, kept);
      store(g_tile_ + offset, probability * (grad - load(delta_ + lane)));
    });
  }

  // The tiles' part in the gradients; grad_key and grad_value begin at the first key of the sequence.
  template <class Scores>
  void accumulate(const Scores& scores, float* grad_key, float* grad_value) {
    const auto [row, rows, key, keys] = at_;
    constexpr int64_t panel = kTileVectors * kLanes;
    if (scores.capped()) {
      for_scores(at_, g_tile_, [&](int64_t, int64_t, float* x) { store(x, load(x) * load(slope_ + (x - g_tile_))); });
    }
    multiply<Lies::along, Into::add>(kTileVectors, keys, width_ / kLanes, rows, p_tile_, kRows, grad_, width_, panel,
                                     grad_value + key * width_, width_);
    multiply<Lies::along, Into::add>(kTileVectors, keys, depth_ / kLanes, rows, g_tile_, kRows, query_, depth_, panel,
                                     grad_key + key * depth_, depth_);
    multiply<Lies::across, Into::add>(kTileVectors, rows, depth_ / kLanes, keys, g_tile_, kRows, packed_key_.data,
                                      packed_key_.stride, panel, grad_query_, depth_);
  }

  void begin_grad_query() { std::fill_n(grad_query_, depth_ * kRows, 0.0f); }
  void store_grad_query(int64_t head, int64_t row) const {
    store_rows(grad_query_, depth_, std::min(kRows, s_.rows - row), static_cast<float>(p_.scale),
               Rows<T>(p_.grad_query, s_.batch, head, s_.row0 + row));
  }

 private:
  // delta = rowsum(grad_output output), added in the micro-kernel's order: where a row has one key, and output is its
  // value, delta takes the rounding errors of grad_P with it.
  void make_delta(int64_t rows) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t panel = r / kPanel * kPanel * value_.columns + r % kPanel;
      F total = {};
      for (int64_t run = 0; run < value_.columns; run += kRun) {
        F sum = {};
        for (int64_t c = run; c < std::min(run + kRun, value_.columns); ++c) {
          sum += load(output_transposed_ + panel + c * kPanel) * load(grad_transposed_ + panel + c * kPanel);
        }
        total += sum;
      }
      store(delta_ + r, total);
    }
  }

  const Params& p_;
  const ops::Sequence& s_;
  Rows<const T> key_, value_;
  int64_t depth_, width_;
  float *query_transposed_, *grad_transposed_, *output_transposed_, *query_, *grad_, *keys_, *values_, *p_tile_,
      *g_tile_, *keep_, *slope_, *grad_query_;
  alignas(64) float lse_[kRows], lse_low_[kRows], delta_[kRows];
  Floats packed_key_;
  TilePlace at_;
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
