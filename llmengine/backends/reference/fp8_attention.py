"""Attention with products of 8-bit floats (llmengine/backends/fp8.py): numbers are rounded as on every backend, and
multiplied in float32 or float64. In float64 probabilities are not rounded: it measures what that costs the others.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.fp8 import LEAST_EXPONENT, LIFT, TILE, is_negated, keys_of_step, width_of
from llmengine.backends.reference.attention import _Block, _group, _Options, _repeat
from llmengine.backends.reference.fp8_linear import wide_of
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def turned(x):
    """Rows of x times their columns' signs and the Walsh-Hadamard matrix, by butterflies of neighbours first."""
    width = x.shape[-1]
    x = x * torch.tensor([-1.0 if is_negated(c) else 1.0 for c in range(width)], device=x.device)
    apart = 1
    while apart < width:
        pairs = x.unflatten(-1, (-1, 2, apart))
        upper, lower = pairs.unbind(-2)
        x = torch.stack((upper + lower, upper - lower), -2).flatten(-3)
        apart *= 2
    return x


def quantise(x):
    """Numbers of x (..., tokens, columns), and the scales of its tiles, (..., tiles)."""
    tokens, x = x.shape[-2], x.float()
    magnitude = pad(torch.where(x.isfinite(), x.abs(), 0.0), (0, 0, 0, -tokens % TILE))
    largest = magnitude.unflatten(-2, (-1, TILE)).flatten(-2).amax(-1)
    mantissa, exponent = torch.frexp(largest)  # 448 is 0.875 2^9
    exponent = (exponent - 9 + (mantissa > 0.875).int()).masked_fill(largest == 0, LEAST_EXPONENT)
    scales = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=LEAST_EXPONENT))
    scaled = x / scales.repeat_interleave(TILE, -1)[..., :tokens, None]
    return torch.where(x.isfinite(), scaled, torch.nan).to(torch.float8_e4m3fn), scales


def operand(x, turn):
    """What is quantised of x (..., tokens, head_dim)."""
    if not turn:
        return x.float()
    return turned(pad(x.float(), (0, width_of(x.shape[-1]) - x.shape[-1])))


def rounded(x, turn):
    """What numbers and scales stand for, in float32 or float64."""
    numbers, scales = quantise(operand(x, turn))
    wide = wide_of(x)
    return numbers.to(wide) * scales.to(wide).repeat_interleave(TILE, -1)[..., : x.shape[-2], None]


def _weigh(logits, values, sinks, step, exact):
    """softmax(logits) values, and lse: keys a step at a time with the largest logit so far, behind them the sink."""
    most = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(most)
    output = logits.new_zeros(*logits.shape[:-1], values.shape[-1])
    for x, v in zip(logits.split(step, -1), values.split(step, -2), strict=True):
        higher = torch.maximum(most, x.amax(-1, keepdim=True)) if x.shape[-1] else most
        base = torch.where(higher == -torch.inf, 0.0, higher)
        rescaling, p = torch.exp(most - base), torch.exp(x - base)
        if not exact:
            p = (p * LIFT).to(torch.float8_e4m3fn).to(p.dtype) / LIFT
        most, total = higher, total * rescaling + p.sum(-1, keepdim=True)
        output = output * rescaling + p @ v
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None].expand_as(most)
        higher = torch.maximum(most, sink)
        base = torch.where(higher == -torch.inf, 0.0, higher)
        rescaling = torch.exp(most - base)
        most, total, output = higher, total * rescaling + torch.exp(sink - base), output * rescaling
    output = torch.where(total == 0, 0.0, output / total)
    return output, (most + total.log()).squeeze(-1)


@kernel(KERNELS, "fp8_attention")
def fp8_attention(
    query, key, value, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right,
    bottom_right, scale,
):  # fmt: skip
    o = _Options(
        None, None, None, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, window_left,
        window_right, bottom_right, scale / width_of(query.shape[3]), 0.0, 0.0,
    )  # fmt: skip
    output = empty_rows_first(query, value.shape[3]).zero_()
    lse = torch.full(query.shape[:3], -torch.inf, dtype=wide_of(query), device=query.device)
    group, step, exact = _group(query, key), keys_of_step(query.shape[3]), query.dtype == torch.float64
    for stream, b, rows, keys in o.sequences(query, key):
        q, k, v = (rounded(x, turn) for x, turn in (
            (query[b, :, rows], True), (key[b, :, keys], True), (value[b, :, keys], False),
        ))  # fmt: skip
        logits = _Block(q, k, None, o, stream).logits
        weighed, lse[b, :, rows] = _weigh(logits, _repeat(v, group), sinks, step, exact)
        output[b, :, rows] = weighed.to(output.dtype)
    return output, lse
