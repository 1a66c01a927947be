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
  PositionKeys keys(p, sequences);
  visit_float(p.query.dtype, [&]<class T>(T type) {
    keys.pack<T>();
    forward_all<T>(p, sequences, [&](const ops::Sequence& s, int64_t n, int64_t head, int64_t row) {
      thread_local Scratch scratch[kTogether];
      return RelativeScores(p, s, head, row, keys, scratch[n], type);
    });
  });
}

const Registrar<ops::RelativeAttentionForward> forward{relative_attention_forward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
