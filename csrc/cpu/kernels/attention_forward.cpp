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

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

void attention_forward(const ops::AttentionForward& p) {
  visit_float(p.query.dtype, [&]<class T>(T) {
    forward_all<T>(p, ops::sequences_of(p),
                   [&](const ops::Sequence& s, int64_t, int64_t head, int64_t) { return Scores(p, s, head); });
  });
}

const Registrar<ops::AttentionForward> forward{attention_forward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
