"""Attention written out from its formulas (csrc/ops/attention.h), one dense score matrix per sequence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.reference.philox import keep_multiplier
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


@dataclass
class _Options:
    mask: Tensor | None
    alibi_slopes: Tensor | None
    distance_bias: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seed: Tensor | None
    window_left: int
    window_right: int
    bottom_right: bool
    scale: float
    softcap: float
    dropout_p: float

    def sequences(self, query, key):
        """(first stream, batch slice, query rows, keys) of each independent block: the batch, or every sequence."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return [(0, slice(None), slice(0, query.shape[2]), slice(0, key.shape[2]))]
        op = "varlen_attention"
        q = boundaries(op, "cu_seqlens_q", self.cu_seqlens_q, query.shape[2], self.max_seqlen_q)
        k = boundaries(op, "cu_seqlens_k", self.cu_seqlens_k, key.shape[2], self.max_seqlen_k)
        return [
            (i, slice(0, 1), slice(*rows), slice(*keys))
            for i, (rows, keys) in enumerate(zip(q, k, strict=True))
        ]  # fmt: skip


def boundaries(op: str, argument: str, cu_seqlens: Tensor, total: int, longest: int) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    pairs = list(itertools.pairwise(ends))
    if ends[0] != 0 or ends[-1] > total or any(b < a for a, b in pairs):
        raise ValueError(
            f"{op}: {argument} must begin with 0, never fall, and end at or below the {total} tokens given, got {ends}"
        )
    for i, (a, b) in enumerate(pairs):
        if b - a > longest:
            raise ValueError(f"{op}: {argument} gives sequence {i} {b - a} tokens, above its maximum {longest}")
    return pairs


class Softmax:
    """Of `logits`, with `keep` on the probabilities where there is dropout."""

    logits: Tensor
    keep: Tensor | None

    def lse(self, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """lse, and what rounding took from it; sinks: (heads,), logits beside those of the keys."""
        logits = self.logits
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:-1], 1)], -1)
        if logits.shape[-1] == 0:
            high = logits.new_full(logits.shape[:-1], -torch.inf)
        else:
            high = logits.logsumexp(-1)
        low = exponentials(logits, high, torch.zeros_like(high)).sum(-1).log()
        return high, torch.where(high.isinf(), 0.0, low)

    def sees(self) -> Tensor:
        """Of each row whether it sees a key. Where it sees none, it has zeros, also where keys or values are NaN."""
        return (self.logits != -torch.inf).any(-1, keepdim=True)

    def probabilities(self, lse: Tensor, lse_low: Tensor) -> Tensor:
        return exponentials(self.logits, lse, lse_low)

    def dropped(self, p: Tensor) -> Tensor:
        return p if self.keep is None else p * self.keep


def exponentials(logits: Tensor, lse: Tensor, lse_low: Tensor) -> Tensor:
    """exp(logits - lse); zero in rows that see nothing."""
    return torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None] - lse_low[..., None])


class _Block(Softmax):
    """Scores, probabilities and dropout of a batch of equally long sequences."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, o: _Options, stream: int):
        (batch, heads, rows, _), keys = query.shape, key.shape[2]
        self.scale = o.scale
        u = o.scale * (query @ _repeat(key, _group(query, key)).mT)
        self.slope = None  # of the soft cap
        if o.softcap:
            tanh = torch.tanh(u / o.softcap)
            u, self.slope = o.softcap * tanh, 1 - tanh.square()
        row = torch.arange(rows, device=query.device)[:, None] + (keys - rows if o.bottom_right else 0)
        distance = torch.arange(keys, device=query.device) - row
        if o.alibi_slopes is not None:
            slopes = o.alibi_slopes.to(u.dtype)[stream : stream + batch]
            u = u - slopes[:, :, None, None] * distance.abs()
        if o.distance_bias is not None:
            farthest = o.distance_bias.shape[1] // 2
            self.entry = distance.clamp(-farthest, farthest) + farthest  # of its table
            u = u + o.distance_bias.to(u.dtype)[:, self.entry]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if o.window_left >= 0:
            seen &= distance >= -o.window_left
        if o.window_right >= 0:
            seen &= distance <= o.window_right
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            u = u + mask.to(u.dtype)
        self.logits = torch.where(seen, u, -torch.inf)
        self.keep = None
        if o.seed is not None:
            streams = stream * heads + torch.arange(batch * heads, device=query.device).view(batch, heads, 1)
            self.keep = keep_multiplier(
                o.seed, o.dropout_p, streams, torch.arange(rows, device=query.device), keys, u.dtype
            )


def _group(query: Tensor, key: Tensor) -> int:
    return max(1, query.shape[1] // max(1, key.shape[1]))


def _repeat(x: Tensor, group: int) -> Tensor:
    """Key heads to query heads."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _sum_groups(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2)


@kernel(KERNELS, "attention_forward")
def attention_forward(query, key, value, *options):
    o = _Options(*options)
    q, k, v = _wide(query), _wide(key), _wide(value)
    output = empty_rows_first(query, value.shape[3]).zero_()
    lse = torch.full(query.shape[:3], -torch.inf, dtype=q.dtype, device=query.device)
    lse_low, sinks = torch.zeros_like(lse), _wide(o.sinks)
    group = _group(query, key)
    for stream, b, rows, keys in o.sequences(query, key):
        block = _Block(q[b, :, rows], k[b, :, keys], o.mask, o, stream)
        lse[b, :, rows], lse_low[b, :, rows] = block.lse(sinks)
        p = block.dropped(block.probabilities(lse[b, :, rows], lse_low[b, :, rows]))
        output[b, :, rows] = torch.where(block.sees(), p @ _repeat(v[b, :, keys], group), 0.0).to(output.dtype)
    return output, lse, lse_low


@kernel(KERNELS, "attention_backward")
def attention_backward(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
    *given, want_grad_mask, want_grad_distance_bias, want_grad_sinks = options
    o = _Options(*given)
    q, k, v, do = _wide(query), _wide(key), _wide(value), _wide(grad_output)
    grad_query, grad_key, grad_value = (empty_rows_first(x, x.shape[3]).zero_() for x in (query, key, value))
    grad_mask = q.new_zeros(o.mask.shape if o.mask is not None and want_grad_mask else (0,))
    grad_distance_bias = q.new_zeros(
        o.distance_bias.shape if o.distance_bias is not None and want_grad_distance_bias else (0,)
    )
    delta = (do * _wide(output)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_sinks = q.new_zeros(0)
    if o.sinks is not None and want_grad_sinks:
        logits = o.sinks[:, None, None].to(q.dtype).expand(*lse.shape, 1)
        shares = exponentials(logits, lse.to(q.dtype), lse_low.to(q.dtype)).squeeze(-1)
        of_rows = torch.where(lse == -torch.inf, 0.0, shares * delta)  # whatever those of no sequence hold
        grad_sinks = -of_rows.sum((0, 2))
    group = _group(query, key)
    for stream, b, rows, keys in o.sequences(query, key):
        block = _Block(q[b, :, rows], k[b, :, keys], o.mask, o, stream)
        p = block.probabilities(lse[b, :, rows].to(q.dtype), lse_low[b, :, rows].to(q.dtype))
        grad_p = block.dropped(do[b, :, rows] @ _repeat(v[b, :, keys], group).mT)
        grad_logits = torch.where(block.sees(), p * (grad_p - delta[b, :, rows, None]), 0.0)
        if want_grad_mask:
            grad_mask += grad_logits.sum_to_size(grad_mask.shape)
        if o.distance_bias is not None and want_grad_distance_bias:
            grad_distance_bias.index_add_(1, block.entry.flatten(), grad_logits.sum(0).flatten(1))
        grad_u = grad_logits if block.slope is None else grad_logits * block.slope
        grad_query[b, :, rows] = (o.scale * (grad_u @ _repeat(k[b, :, keys], group))).to(query.dtype)
        grad_key[b, :, keys] = _sum_groups(o.scale * (grad_u.mT @ q[b, :, rows]), group).to(key.dtype)
        grad_value[b, :, keys] = _sum_groups(block.dropped(p).mT @ do[b, :, rows], group).to(value.dtype)
    return grad_query, grad_key, grad_value, grad_mask, grad_distance_bias, grad_sinks
