"""Rotary embedding of the queries and keys in a packed projection, beside the usual formula in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward

from llmengine import functional
from llmengine.testing.samples.rotary import plain

# (tokens, heads, head_dim, R)
SHAPES = [(2048, 12, 64, 64), (4096, 16, 128, 128), (2048, 32, 80, 32)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
PEERS = pytest.mark.parametrize("peer", ["llmengine", "torch"])
KIND = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
FUNCTIONS = {"llmengine": functional.rotary_embedding, "torch": plain}


def _call(peer, shape, dtype, interleaved):
    tokens, heads, head_dim, features = shape
    angles = torch.rand(tokens, features // 2)
    query = torch.randn(tokens, 3, heads, head_dim).to(dtype)[:, 0]
    cos, sin = angles.cos(), angles.sin()
    return query, lambda x: FUNCTIONS[peer](x, cos, sin, interleaved=interleaved)


@PEERS
@KIND
@SHAPE
def bench_forward(side_by_side, peer, dtype, shape, interleaved):
    query, function = _call(peer, shape, dtype, interleaved)
    side_by_side(peer, {peer: lambda: function(query)}, bytes_moved=2 * query.numel() * query.element_size())


@PEERS
@KIND
@SHAPE
def bench_forward_backward(side_by_side, peer, dtype, shape, interleaved):
    query, function = _call(peer, shape, dtype, interleaved)
    call = forward_backward(function, query)
    side_by_side(peer, {peer: call}, bytes_moved=4 * query.numel() * query.element_size())
