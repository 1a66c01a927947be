// Attention, forward: an online softmax over tiles of keys (formulas: ops/attention.h, tiles: cpu/attention_tile.h).
//
//   A task owns kRows rows of one head: query^T, packed once, the running maximum and sum of each row, and the output
//   tile in floats. Against every tile of kKeys keys that the rows see:
//
//     tile = key query^T                        4 kRows kKeys head_dim flops for both products
//     logits, new maximum m, P = exp(tile - m)  about 25 instructions a vector of scores
//     output = exp(old m - m) output + P value
//
//   Memory: query and output once, key and value once a task, from the second-level cache. Limit: the multiply-add
//   ports; with head_dim 64 the exponentials take a fifth beside them.
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

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

template <class T>
void forward_rows(const ops::AttentionForward& p, const ops::Sequence& s, int64_t head, int64_t row) {
  const int64_t rows = std::min(kRows, s.rows - row), key_head = head / p.group();
  const Rows<const T> query(p.query, s.batch, head, s.row0 + row);
  const Rows<const T> key(p.key, s.batch, key_head, s.key0), value(p.value, s.batch, key_head, s.key0);
  const int64_t depth = query.columns, width = padded(value.columns);
  const float scale = static_cast<float>(p.scale);
  const Scores scores(p, s, head);

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
    for_lanes(out.columns, [&](int64_t c, auto n) {
      store_n(out.row(r) + c, total == 0.0f ? F{} : load(line + c) * (1.0f / total), n);
    });
    const double lse = std::log(static_cast<double>(total)) + (total == 0.0f ? 0.0 : statistics.largest[r]);
    const float high = static_cast<float>(lse);
    p.lse.as<float>()[statistic + r] = high;
    p.lse_low.as<float>()[statistic + r] = std::isinf(high) ? 0.0f : static_cast<float>(lse - high);
  }
}

void attention_forward(const ops::AttentionForward& p) {
  const auto sequences = ops::sequences_of(p);
  const SequenceTasks tasks(sequences, [&](size_t s) { return p.heads() * count_of(sequences[s].rows, kRows); });
  visit_float(p.query.dtype, [&]<class T>(T) {
    parallel_each(tasks.size(), [&](int64_t index) {
      const auto [sequence, which, number] = tasks[index];
      const int64_t tiles = count_of(sequence.rows, kRows);
      // the last rows first: where attention is causal they have the most keys
      forward_rows<T>(p, sequence, number / tiles, (tiles - 1 - number % tiles) * kRows);
    });
  });
}

const Registrar<ops::AttentionForward> forward{attention_forward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
