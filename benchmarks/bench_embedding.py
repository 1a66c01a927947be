"""Embedding beside PyTorch's: rows of the table by token id, and the table's dense gradient.

Limit: memory; of the gradient nearly all is its zeros, rows x width elements. Ids as text has them: Zipf's law, so that
a few recur hundreds of times.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as torch_functional

from llmengine import functional

# (tokens, rows of the table, width)
SHAPES = [(4096, 50257, 768), (8192, 30522, 768), (8192, 2, 768)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
PEERS = pytest.mark.parametrize("peer", ["llmengine", "torch"])
FUNCTIONS = {"llmengine": functional.embedding, "torch": torch_functional.embedding}


def _call(shape, dtype):
    tokens, rows, width = shape
    ids = torch.multinomial(1 / torch.arange(1.0, rows + 1), tokens, replacement=True)
    return ids, torch.randn(rows, width).to(dtype)


@PEERS
@SHAPE
def bench_forward(side_by_side, peer, dtype, shape):
    ids, weight = _call(shape, dtype)
    moved = 2 * len(ids) * weight.shape[1] * weight.element_size()
    side_by_side(peer, {peer: lambda: FUNCTIONS[peer](ids, weight)}, bytes_moved=moved)


@PEERS
@SHAPE
def bench_backward(side_by_side, peer, dtype, shape):
    ids, weight = _call(shape, dtype)
    output = FUNCTIONS[peer](ids, weight.requires_grad_())
    grad = torch.randn_like(output)

    def call():
        torch.autograd.grad(output, weight, grad, retain_graph=True)

    side_by_side(peer, {peer: call}, bytes_moved=(grad.numel() + weight.numel()) * grad.element_size())
