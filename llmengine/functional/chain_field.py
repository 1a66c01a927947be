"""A linear-chain conditional random field over the tags of packed sequences (Lafferty et al. 2001)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from llmengine.functional.arguments import (
    check_boundaries,
    check_float,
    check_same_device,
    check_tensor,
    needs_grad,
    parameter_like,
    short,
)
from llmengine.functional.cross_entropy import INDICES
from llmengine.ops import chain_field as ops


def chain_field_loss(
    emissions: Tensor, tags: Tensor, transition: Tensor, start: Tensor, end: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """-log p(tags) of each sequence, where p(y) is exp(score(y)) over its sum for all sequences of tags, and

        score(y) = start[y_0] + sum_t emissions[t, y_t] + sum_t transition[y_t-1, y_t] + end[y_n-1]

    by the forward algorithm, with gradients by the backward algorithm.

    Shapes: emissions (tokens, K), sequences one after another; tags (tokens,), integers in [0, K); transition (K, K),
    [from, to]; start and end (K,), all three in emissions' dtype or float32; cu_seqlens int32 (sequences + 1,), rising
    from 0: sequence s holds the tokens cu_seqlens[s] to cu_seqlens[s + 1]. The result is (sequences,), float32 (float64
    for float64); a sequence without tokens has the loss 0. Tokens past the last boundary belong to no sequence.

    -inf is allowed anywhere and says what cannot be: its probability and gradient are 0. Given tags that cannot be have
    the loss +inf, and finite gradients. NaN and +inf make the losses of the sequences that they reach NaN.
    Raises ValueError on shapes, dtypes and devices that do not fit, and on the CPU for a tag out of range and for
    boundaries that fall or pass the tokens.
    """
    op = "chain_field_loss"
    parameters = _field(op, emissions, transition, start, end, cu_seqlens)
    check_tensor(op, "tags", tags)
    if tags.dtype not in INDICES:
        raise ValueError(f"{op}: tags has dtype {short(tags.dtype)}; allowed: {', '.join(map(short, INDICES))}")
    if tags.shape != emissions.shape[:1]:
        raise ValueError(f"{op}: tags has shape {tuple(tags.shape)}; expected ({emissions.shape[0]},)")
    check_same_device(op, emissions=emissions, tags=tags)
    arguments = (emissions, tags.to(torch.int64), *parameters, cu_seqlens)
    if needs_grad(emissions, *parameters):
        return ops.ChainField.apply(*arguments)
    return ops.chain_field_forward(*arguments)[0]


@overload
def chain_field_decode(
    emissions: Tensor, transition: Tensor, start: Tensor, end: Tensor, cu_seqlens: Tensor, *,
    return_scores: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def chain_field_decode(
    emissions: Tensor, transition: Tensor, start: Tensor, end: Tensor, cu_seqlens: Tensor, *,
    return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@torch.no_grad()
def chain_field_decode(emissions, transition, start, end, cu_seqlens, *, return_scores=False):
    """The tags of the largest score of each sequence, by Viterbi's algorithm (1967); arguments as `chain_field_loss`'s.

    The result is int64 (tokens,), with `return_scores` also the scores, (sequences,), float32 (float64 for float64;
    0 for a sequence without tokens). Constrained decoding is a transition, start or end of -inf. Of equal scores, as
    computed in float32 from the first token to the last, the lowest tag wins at every step, the last token's first; all
    backends give the same bits.

    Tags are -1 past the last boundary and where a sequence has none: its score is -inf (all tags are forbidden) or NaN
    (it holds a NaN or +inf). There is no gradient. Raises ValueError as `chain_field_loss` does.
    """
    parameters = _field("chain_field_decode", emissions, transition, start, end, cu_seqlens)
    tags, scores = ops.chain_field_decode(emissions, *parameters, cu_seqlens)
    return (tags, scores) if return_scores else tags


def _field(
    op: str, emissions: Tensor, transition: Tensor, start: Tensor, end: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks what both operators take; the parameters in the statistics' dtype."""
    check_float(op, "emissions", emissions)
    if emissions.ndim != 2 or emissions.shape[1] == 0:
        raise ValueError(
            f"{op}: emissions has shape {tuple(emissions.shape)}; expected (tokens, K) with at least one tag"
        )
    tags = emissions.shape[1]
    transition = parameter_like(op, "transition", transition, (tags, tags), emissions)
    start = parameter_like(op, "start", start, (tags,), emissions)
    end = parameter_like(op, "end", end, (tags,), emissions)
    check_boundaries(op, "cu_seqlens", cu_seqlens)
    check_same_device(op, emissions=emissions, transition=transition, start=start, end=end, cu_seqlens=cu_seqlens)
    wide = torch.promote_types(emissions.dtype, torch.float32)
    return transition.to(wide), start.to(wide), end.to(wide)
