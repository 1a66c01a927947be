"""A linear-chain conditional random field, written out from its formulas (csrc/ops/chain_field.h).

The t-th tokens of all sequences that have one go together; the tokens before them lie one row above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _check_boundaries(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"{op}: cu_seqlens must begin with 0, got {int(cu_seqlens[0])}")
    if (lengths < 0).any():
        s = int((lengths < 0).nonzero()[0])
        raise ValueError(f"{op}: cu_seqlens gives sequence {s} {int(lengths[s])} tokens: it must never fall")
    if int(cu_seqlens[-1]) > tokens:
        raise ValueError(f"{op}: cu_seqlens ends at {int(cu_seqlens[-1])}, past the {tokens} tokens")


def _check_tags(op: str, tags: Tensor, count: int, inside: int) -> None:
    wrong = ((tags < 0) | (tags >= count))[:inside]
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: tags has {int(tags[t])} at token {t}; allowed: 0 to {count - 1} ({count} tags)")


def _steps(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For t = 0, 1, ...: the sequences that are longer than t, and their t-th tokens."""
    first, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    active = [(lengths > t).nonzero().squeeze(1) for t in range(longest)]
    return [(sequences, first[sequences] + t) for t, sequences in enumerate(active)]


def _last(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences that have tokens, and their last ones."""
    sequences = cu_seqlens.diff().nonzero().squeeze(1)
    return sequences, cu_seqlens[1:].long()[sequences] - 1


def _shift(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """What to take off before exponentials: the largest, or 0 where all are -inf."""
    largest = x.amax(dim, keepdim=True)
    return torch.where(largest == -torch.inf, 0.0, largest)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """NaN for +inf, where torch.logsumexp gives +inf: there is no distribution."""
    shift = _shift(x, dim)
    return shift.squeeze(dim) + (x - shift).exp().sum(dim).log()


def _softmax(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """0 where all are -inf."""
    e = (x - _shift(x, dim)).exp()
    total = e.sum(dim, keepdim=True)
    return e * torch.where(total == 0, 0.0, 1.0 / total)


@kernel(KERNELS, "chain_field_forward")
def chain_field_forward(emissions, tags, transition, start, end, cu_seqlens):
    _check_boundaries("chain_field", cu_seqlens, len(emissions))
    _check_tags("chain_field", tags, emissions.shape[1], int(cu_seqlens[-1]))
    x = emissions.to(transition.dtype)
    alpha = torch.full_like(x, -torch.inf)
    log_z, score = x.new_zeros(len(cu_seqlens) - 1), x.new_zeros(len(cu_seqlens) - 1)
    for t, (sequences, rows) in enumerate(_steps(cu_seqlens)):
        if t:
            arrived = _log_sum_exp(alpha[rows - 1][:, :, None] + transition, 1)
            score[sequences] += transition[tags[rows - 1], tags[rows]]
        else:
            arrived = start.expand(len(rows), -1)
            score[sequences] += start[tags[rows]]
        line = arrived + x[rows]
        shift = _shift(line, 1)
        alpha[rows] = line - shift
        log_z[sequences] += shift.squeeze(1)
        score[sequences] += x[rows, tags[rows]]
    sequences, rows = _last(cu_seqlens)
    log_z[sequences] += _log_sum_exp(alpha[rows] + end, 1)
    score[sequences] += end[tags[rows]]
    impossible = (score == -torch.inf) & ~log_z.isnan()
    return torch.where(impossible, torch.inf, log_z - score), alpha


@kernel(KERNELS, "chain_field_backward")
def chain_field_backward(grad_losses, emissions, tags, transition, start, end, cu_seqlens, alpha):
    _check_boundaries("chain_field backward", cu_seqlens, len(emissions))
    _check_tags("chain_field backward", tags, emissions.shape[1], int(cu_seqlens[-1]))
    x, count = emissions.to(transition.dtype), emissions.shape[1]
    beta, upstream = torch.zeros_like(x), x.new_zeros(len(x), 1)
    beta[_last(cu_seqlens)[1]] = end
    grad_transition = torch.zeros_like(transition)
    steps = _steps(cu_seqlens)
    for t, (sequences, rows) in reversed(list(enumerate(steps))):
        g = grad_losses[sequences]
        upstream[rows] = g[:, None]
        if t:
            behind = transition + (x + beta)[rows][:, None, :]
            beta[rows - 1] = _log_sum_exp(behind, 2)
            pairs = _softmax(alpha[rows - 1][:, :, None] + behind, (1, 2))
            grad_transition += (pairs * g[:, None, None]).sum(0)
            grad_transition.index_put_((tags[rows - 1], tags[rows]), -g, accumulate=True)
    inside = int(cu_seqlens[-1])
    grad = torch.zeros_like(x)
    right = torch.nn.functional.one_hot(tags[:inside], count)
    grad[:inside] = upstream[:inside] * (_softmax((alpha + beta)[:inside], 1) - right)
    first = steps[0][1] if steps else tags[:0]
    return grad.to(emissions.dtype), grad_transition, grad[first].sum(0), grad[_last(cu_seqlens)[1]].sum(0)


@kernel(KERNELS, "chain_field_decode")
def chain_field_decode(emissions, transition, start, end, cu_seqlens):
    _check_boundaries("chain_field decoding", cu_seqlens, len(emissions))
    x = emissions.to(transition.dtype)
    sequences, rows = _last(cu_seqlens)
    lengths, inside = cu_seqlens.diff(), int(cu_seqlens[-1])
    best, before = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.int64)
    steps = _steps(cu_seqlens)
    for t, (_, here) in enumerate(steps):
        # max takes the first of equal ones
        arrived, before[here] = (best[here - 1][:, :, None] + transition).max(1) if t else (start, before[here])
        best[here] = arrived + x[here]
    scores = x.new_zeros(len(lengths))
    scores[sequences], chosen = (best[rows] + end).max(1)
    no_scores = torch.zeros_like(lengths, dtype=torch.bool)  # what holds NaN or +inf
    token_of = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    no_scores[token_of[~(x[:inside] < torch.inf).all(1)]] = True
    no_scores |= (lengths > 0) & ~((start < torch.inf) & (end < torch.inf)).all()
    no_scores |= (lengths > 1) & ~(transition < torch.inf).all()
    scores = torch.where(no_scores, torch.nan, scores)
    tags = torch.full((len(x),), -1, device=x.device)
    tags[rows] = torch.where(scores[sequences].isfinite(), chosen, -1)
    for t, (_, here) in reversed(list(enumerate(steps))):
        if t:
            tag = tags[here]
            came_from = before[here].gather(1, tag.clamp(min=0)[:, None]).squeeze(1)
            tags[here - 1] = torch.where(tag < 0, -1, came_from)
    return tags, scores
