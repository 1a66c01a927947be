"""Cases of the chain field: ragged lengths, one tag and many, what is forbidden, what is nearly certain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine import functional
from llmengine.testing.sample import Operator, Sample

# (K, lengths, tokens past the last boundary)
CASES = [
    (3, [5, 1, 0, 4, 2], 0), (9, [17, 3, 30, 8], 0), (1, [4, 1], 0), (2, [6, 0], 2), (16, [1, 1, 1], 0),
    (17, [12, 7], 1), (45, [20, 9, 14], 0), (128, [6, 3], 0), (5, [], 0), (4, [0, 0], 0), (4, [], 3), (33, [70], 0),
]  # fmt: skip


def rows_of(x: Tensor, lengths: Tensor) -> Tensor:
    """x (tokens, ...) of packed sequences as (sequences, longest, ...) with zeros behind."""
    longest = max(int(lengths.max()) if len(lengths) else 0, 1)
    here = torch.arange(longest, device=x.device) < lengths[:, None]
    rows = x.new_zeros(*here.shape, *x.shape[1:])
    return rows.index_put((here,), x[: int(lengths.sum())])


def plain(emissions, tags, transition, start, end, cu_seqlens):
    """The usual way in PyTorch: padded rows, and a loop over time whose every step holds (sequences, K, K) numbers."""
    wide = torch.promote_types(emissions.dtype, torch.float32)
    transition, start, end = transition.to(wide), start.to(wide), end.to(wide)
    lengths = cu_seqlens.diff().long()
    x, tags = rows_of(emissions.to(wide), lengths), rows_of(tags, lengths)
    alpha = start + x[:, 0]
    for t in range(1, x.shape[1]):
        following = torch.logsumexp(alpha[:, :, None] + transition, 1) + x[:, t]
        alpha = torch.where((lengths > t)[:, None], following, alpha)
    here = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    emitted = torch.where(here, x.gather(2, tags[:, :, None]).squeeze(2), 0.0).sum(1)
    moved = torch.where(here[:, 1:], transition[tags[:, :-1], tags[:, 1:]], 0.0).sum(1)
    last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    losses = torch.logsumexp(alpha + end, 1) - (emitted + moved + start[tags[:, 0]] + end[last])
    return torch.where(lengths > 0, losses, 0.0)


def plain_decode(emissions, transition, start, end, cu_seqlens, *, return_scores=True):
    """Viterbi's algorithm in the same way."""
    wide = torch.promote_types(emissions.dtype, torch.float32)
    transition, start, end = transition.to(wide), start.to(wide), end.to(wide)
    lengths = cu_seqlens.diff().long()
    x = rows_of(emissions.to(wide), lengths)
    best, pointers = start + x[:, 0], []
    stay = torch.arange(x.shape[2], device=x.device).expand(len(x), -1)
    for t in range(1, x.shape[1]):
        value, come_from = (best[:, :, None] + transition).max(1)
        on = (lengths > t)[:, None]
        best = torch.where(on, value + x[:, t], best)
        pointers.append(torch.where(on, come_from, stay))
    scores, tag = (best + end).max(1)
    found = [tag]
    for come_from in reversed(pointers):
        found.append(come_from.gather(1, found[-1][:, None]).squeeze(1))
    here = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    tags = torch.full((len(emissions),), -1, device=x.device)
    tags[: int(lengths.sum())] = torch.stack(found[::-1], 1)[here]
    return (tags, torch.where(lengths > 0, scores, 0.0)) if return_scores else tags


def arguments(k: int, lengths: list[int], beyond: int = 0, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Random emissions (times `scale`), tags, transition, start, end and boundaries, in float64."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths) + beyond

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tags = torch.randint(k, (tokens,), generator=g)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return scale * randn(tokens, k), tags, randn(k, k), randn(k), randn(k), cu_seqlens


def blocks(k: int) -> tuple[Tensor, Tensor]:
    """Transitions and starts of a BIO scheme for k = 1 + 2 n tags O, B-1, I-1, B-2, ...: 0 where one may follow the
    other, -inf where not."""
    kind = torch.arange(k)
    inside = (kind > 0) & (kind % 2 == 0)
    may = ~inside[None, :] | ((kind[:, None] == kind[None, :]) | (kind[:, None] == kind[None, :] - 1))
    return torch.where(may, 0.0, -math.inf).double(), torch.where(inside, -math.inf, 0.0).double()


def _with_blocks() -> tuple[Tensor, ...]:
    emissions, tags, transition, start, end, cu_seqlens = arguments(9, [12, 1, 7])
    moves, starts = blocks(9)
    return emissions, torch.zeros_like(tags), transition + moves, start + starts, end, cu_seqlens


def _given() -> list[tuple[str, tuple[Tensor, ...]]]:
    given = [(f"{k} tags, lengths {lengths}" + f" + {beyond}" * (beyond > 0), arguments(k, lengths, beyond))
             for k, lengths, beyond in CASES]  # fmt: skip
    given.append(("nearly certain", arguments(9, [25, 12], scale=20.0)))
    given.append(("blocks", _with_blocks()))
    emissions, tags, transition, start, end, cu_seqlens = arguments(6, [9, 4])
    given.append(
        ("forbidden by numbers", (emissions, tags, transition - 1e4 * transition.gt(1), start, end, cu_seqlens))
    )
    return given


def _samples() -> list[Sample]:
    return [Sample(name, args) for name, args in _given()]


def _decode_samples() -> list[Sample]:
    return [
        Sample(name, (args[0], *args[2:]), {"return_scores": True}, constants=(0, 1, 2, 3)) for name, args in _given()
    ]


OPERATORS = [
    Operator("chain_field_loss", functional.chain_field_loss, _samples, plain, node="chain_field"),
    Operator("chain_field_decode", functional.chain_field_decode, _decode_samples, plain_decode, node="chain_field"),
]
