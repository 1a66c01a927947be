"""Attention, padded and packed, beside torch.nn.functional.scaled_dot_product_attention.

PyTorch is given its best: is_causal instead of a mask, and contiguous (batch, heads, tokens, head_dim) operands. Packed
sequences have no counterpart there; the peer computes them padded, without the mask that it would need.
Floating-point operations are those of the products alone: 4 rows keys head_dim forward, 2.5 times as many backward.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

# name: (batch, heads, length, head_dim, causal)
SHAPES = {
    "bert": (8, 12, 128, 64, False), "gpt": (2, 12, 1024, 64, True), "long": (1, 8, 4096, 64, True),
    "wide": (2, 8, 512, 128, False), "long-wide": (1, 6, 4096, 128, False), "long-wide-causal": (1, 6, 4096, 128, True),
}  # fmt: skip
PASSES = ["forward", "both"]


def operands(shape, dtype):
    batch, heads, length, head_dim, _ = shape
    return [torch.randn(batch, heads, length, head_dim).to(dtype) for _ in range(3)]


def flops(shape, which):
    batch, heads, length, head_dim, causal = shape
    forward = 4 * batch * heads * length * length * head_dim * (0.5 if causal else 1.0)
    return forward * (1.0 if which == "forward" else 3.5)


def timed(which, function, tensors):
    return forward_backward(function, *tensors) if which == "both" else lambda: function(*tensors)


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", SHAPES)
def bench_padded(side_by_side, peer, dtype, name, which):
    shape = SHAPES[name]
    tensors, causal = operands(shape, dtype), shape[-1]

    def call(room):
        attention = room.scaled_dot_product_attention
        return timed(which, lambda q, k, v: attention(q, k, v, is_causal=causal), tensors)

    calls = {"llmengine": call(functional), "torch": call(torch_functional)}
    side_by_side(peer, calls, flops=flops(shape, which))


LENGTHS = [512, 37, 260, 128, 90, 411, 64, 300]  # of 8 sequences: 1802 tokens, 4096 when padded


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def bench_packed(side_by_side, peer, dtype, causal, which):
    heads, head_dim, longest = 12, 64, max(LENGTHS)
    packed = [torch.randn(sum(LENGTHS), heads, head_dim).to(dtype) for _ in range(3)]
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)

    def ours(q, k, v):
        return functional.varlen_attention(q, k, v, cu, cu, longest, longest, is_causal=causal)

    def padded(q, k, v):
        return torch_functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    calls = {
        "llmengine": timed(which, ours, packed),
        "torch": timed(which, padded, operands((len(LENGTHS), heads, longest, head_dim, causal), dtype)),
    }
    total = sum(flops((1, heads, length, head_dim, causal), which) for length in LENGTHS)
    side_by_side(peer, calls, flops=total)
