// Relative attention, forward (formulas: ops/relative_attention.h, tiles: cpu/relative_tile.h).
//
//   A task owns kRows rows of one head and goes through the tiles of keys as attention does (attention_forward.cpp).
//   Against each it makes a third product, of as many flops and an eighth more: position_query with the position keys
//   of the tile's distances. These are packed once a call, transposed, which no task then repeats.
//
//   Memory: what attention moves, and 4 head_dim bytes a head and distance, from the second-level cache. Limit: the
//   multiply-add ports.
#include "cpu/relative_tile.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

void relative_attention_forward(const ops::RelativeAttentionForward& p) {
  const auto sequences = ops::sequences_of(p);
  const SequenceTasks tasks(sequences, [&](size_t s) { return p.heads() * count_of(sequences[s].rows, kRows); });
  PositionKeys keys(p, sequences);
  visit_float(p.query.dtype, [&]<class T>(T type) {
    keys.pack<T>();
    parallel_each(tasks.size(), [&](int64_t index) {
      const auto [sequence, which, number] = tasks[index];
      const int64_t tiles = count_of(sequence.rows, kRows);
      const int64_t head = number / tiles, row = (tiles - 1 - number % tiles) * kRows;
      thread_local Scratch scratch;
      forward_rows<T>(p, sequence, head, row, RelativeScores(p, sequence, head, row, keys, scratch, type));
    });
  });
}

const Registrar<ops::RelativeAttentionForward> forward{relative_attention_forward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
