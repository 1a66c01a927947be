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
#include "cpu/attention_rows.h"
#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

void attention_forward(const ops::AttentionForward& p) {
  const auto sequences = ops::sequences_of(p);
  const SequenceTasks tasks(sequences, [&](size_t s) { return p.heads() * count_of(sequences[s].rows, kRows); });
  visit_float(p.query.dtype, [&]<class T>(T) {
    parallel_each(tasks.size(), [&](int64_t index) {
      const auto [sequence, which, number] = tasks[index];
      const int64_t tiles = count_of(sequence.rows, kRows);
      // the last rows first: where attention is causal they have the most keys
      const int64_t head = number / tiles, row = (tiles - 1 - number % tiles) * kRows;
      forward_rows<T>(p, sequence, head, row, Scores(p, sequence, head));
    });
  });
}

const Registrar<ops::AttentionForward> forward{attention_forward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
