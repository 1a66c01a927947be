"""Attention with relative positions, written out from its formulas (csrc/ops/relative_attention.h), one dense score
matrix per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.reference.attention import Softmax, boundaries
from llmengine.backends.reference.philox import keep_multiplier
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


@dataclass
class _Options:
    query_segments: Tensor | None
    key_segments: Tensor | None
    query_positions: Tensor | None
    query_ranks: Tensor | None
    key_ranks: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seed: Tensor | None
    zero_distance: int
    is_causal: bool
    include_self: bool
    scale: float
    dropout_p: float

    def sequences(self, query, key):
        """(index, rows, keys) of each sequence."""
        op = "relative_attention"
        q = boundaries(op, "cu_seqlens_q", self.cu_seqlens_q, query.shape[2], self.max_seqlen_q)
        k = boundaries(op, "cu_seqlens_k", self.cu_seqlens_k, key.shape[2], self.max_seqlen_k)
        return [(i, slice(*rows), slice(*keys)) for i, (rows, keys) in enumerate(zip(q, k, strict=True))]

    def distances(self, rows: slice, keys: slice, device: torch.device) -> Tensor:
        """p_i - j of a sequence's rows and keys."""
        key = torch.arange(keys.stop - keys.start, device=device)
        if self.query_positions is None:
            row = torch.arange(rows.stop - rows.start, device=device) + len(key) - (rows.stop - rows.start)
        else:
            row = self.query_positions[rows].long()
        return row[:, None] - key

    def seen(self, distance: Tensor, rows: slice, keys: slice) -> Tensor:
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.query_ranks is not None and self.key_ranks is not None:
            seen = self.key_ranks[keys] < self.query_ranks[rows, None]
            if self.include_self:
                seen = seen | (distance == 0)
        return seen & (distance >= 0) if self.is_causal else seen


class _Sequence(Softmax):
    """Scores, probabilities and dropout of the heads of one sequence."""

    def __init__(self, o: _Options, index: int, rows: slice, keys: slice, operands: tuple):
        query, position_query, key, _, position_key, segment_scores = operands
        distance = o.distances(rows, keys, query.device)
        seen = o.seen(distance, rows, keys)
        self.place = self._places(o, index, distance, position_key.shape[2]).expand(query.shape[1], -1, -1)
        self.r, self.q, self.pq, self.k = (
            position_key[0],
            query[0, :, rows],
            position_query[0, :, rows],
            key[0, :, keys],
        )
        u = self.q @ self.k.mT + (self.pq @ self.r.mT).gather(2, self.place)
        self.other = None  # segments differ
        if segment_scores is not None and o.query_segments is not None and o.key_segments is not None:
            self.other = o.query_segments[rows, None] != o.key_segments[keys]
            same, other = segment_scores[rows].transpose(0, 1).to(u.dtype).split(1, dim=-1)  # (heads, rows, 1) each
            u = u + torch.where(self.other, other, same)
        self.scale, self.logits = o.scale, torch.where(seen, o.scale * u, -torch.inf)
        self.keep = None
        if o.seed is not None:
            heads = torch.arange(query.shape[1], device=query.device)[:, None]
            row = torch.arange(distance.shape[0], device=query.device)
            stream = index * query.shape[1] + heads
            self.keep = keep_multiplier(o.seed, o.dropout_p, stream, row, distance.shape[1], u.dtype)

    @staticmethod
    def _places(o: _Options, index: int, distance: Tensor, count: int) -> Tensor:
        """The rows of position_key that hold the distances; of those that a causal call never looks at, any."""
        wanted = distance.clamp(min=0) if o.is_causal else distance
        first, last = (int(wanted.min()), int(wanted.max())) if wanted.numel() else (0, -1)
        if first <= last and (first < -o.zero_distance or last >= count - o.zero_distance):
            raise ValueError(
                f"relative_attention: position_key covers the distances {-o.zero_distance} to "
                f"{count - o.zero_distance - 1} (zero_distance {o.zero_distance}), but sequence {index} has {first} to "
                f"{last}"
            )
        return wanted + o.zero_distance

    def gradients(self, grad_logits: Tensor) -> tuple[Tensor, ...]:
        """Of query, position_query, key, position_key and, where there are segments, the segment scores."""
        grad_u = self.scale * grad_logits
        grad_positions = grad_u.new_zeros(*grad_u.shape[:2], self.r.shape[1]).scatter_add(2, self.place, grad_u)
        segments: tuple[Tensor, ...] = ()
        if self.other is not None:
            parts = (torch.where(self.other, 0.0, grad_u), torch.where(self.other, grad_u, 0.0))
            segments = (torch.stack([part.sum(-1) for part in parts], -1).transpose(0, 1),)
        return (
            grad_u @ self.k, grad_positions @ self.r, grad_u.mT @ self.q, grad_positions.mT @ self.pq, *segments
        )  # fmt: skip


@kernel(KERNELS, "relative_attention_forward")
def relative_attention_forward(*args):
    operands, o = tuple(map(_wide, args[:6])), _Options(*args[6:])
    query, value = args[0], operands[3]
    output = empty_rows_first(query, value.shape[3]).zero_()
    lse = torch.full(query.shape[:3], -torch.inf, dtype=value.dtype, device=query.device)
    lse_low = torch.zeros_like(lse)
    for index, rows, keys in o.sequences(query, args[2]):
        sequence = _Sequence(o, index, rows, keys, operands)
        lse[0, :, rows], lse_low[0, :, rows] = sequence.lse()
        p = sequence.dropped(sequence.probabilities(lse[0, :, rows], lse_low[0, :, rows]))
        output[0, :, rows] = (p @ value[0, :, keys]).to(output.dtype)
    return output, lse, lse_low


@kernel(KERNELS, "relative_attention_backward")
def relative_attention_backward(grad_output, grad_lse, output, lse, lse_low, *args):
    operands, o = tuple(map(_wide, args[:6])), _Options(*args[6:])
    do, value = _wide(grad_output), operands[3]
    grad_query, grad_position_query, grad_key, grad_value, grad_position_key = (
        empty_rows_first(x, x.shape[3]).zero_() for x in args[:5]
    )
    grad_r = torch.zeros_like(operands[4])
    grad_segments = value.new_zeros((0,) if args[5] is None else args[5].shape)
    delta = (do * _wide(output)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    for index, rows, keys in o.sequences(args[0], args[2]):
        sequence = _Sequence(o, index, rows, keys, operands)
        p = sequence.probabilities(lse[0, :, rows].to(do.dtype), lse_low[0, :, rows].to(do.dtype))
        grad_p = sequence.dropped(do[0, :, rows] @ value[0, :, keys].mT)
        of_query, of_position_query, of_key, of_position_key, *of_segments = sequence.gradients(
            p * (grad_p - delta[0, :, rows, None])
        )
        grad_query[0, :, rows] = of_query.to(grad_query.dtype)
        grad_position_query[0, :, rows] = of_position_query.to(grad_query.dtype)
        grad_key[0, :, keys] = of_key.to(grad_key.dtype)
        grad_value[0, :, keys] = (sequence.dropped(p).mT @ do[0, :, rows]).to(grad_value.dtype)
        grad_r[0] += of_position_key
        if of_segments:
            grad_segments[rows] = of_segments[0]
    grad_position_key.copy_(grad_r)
    return grad_query, grad_position_query, grad_key, grad_value, grad_position_key, grad_segments
