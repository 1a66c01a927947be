// Attention, forward: an online softmax over tiles of keys (formulas: ops/attention.h, tiles: cpu/attention_tile.h,
// products: cpu/attention_products.h).
//
//   A task owns up to kTogether tiles of kRows rows of the heads that share a key head. Of each it keeps query^T,
//   packed once, the running maximum and sum of each row, and the sums of the output in floats. It goes once through
//   the tiles of kKeys keys that any of its rows sees, and against each, for every row tile that sees some of it:
//
//     tile = key query^T                        4 kRows kKeys head_dim flops for both products
//     logits, new maximum m, P = exp(tile - m)  about 20 instructions a vector of scores
//     output = exp(old m - m) output + P value
//
//   Where causality or a window hides part of a tile, its products, exponentials and sums leave out what no row of a
//   vector sees. Tasks are handed out as threads come free, those with the most keys first; which row tiles go together
//   changes no bit, so that it may depend on the number of threads.
//
//   Memory: query and output once, key and value once a task, and from the second-level cache once a row tile. Limit:
//   the multiply-add ports; beside them the exponentials take a tenth of the time in floats at head_dim 64, and a fifth
//   where pairs of bf16 halve the products' time.
#include "cpu/attention_amx.h"
#include "cpu/attention_rows.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

void attention_forward(const ops::AttentionForward& p) {
#if defined(LLMENGINE_AMX)
  if (amx_takes(p)) return amx_forward(p);
#endif
  visit_float(p.query.dtype, [&]<class T>(T) {
    forward_all<T>(p, ops::sequences_of(p),
                   [&](const ops::Sequence& s, int64_t, int64_t head, int64_t) { return Scores(p, s, head); });
  });
}

const Registrar<ops::AttentionForward> forward{attention_forward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
