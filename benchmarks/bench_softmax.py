"""Softmax along the last dimension, beside torch.nn.functional: attention scores and a vocabulary's logits; and beside
copying as many bytes, forward and backward: x, the result twice, its gradient and x's."""

from __future__ import annotations

import pytest
import torch
from conftest import copies, forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

SHAPES = [(8, 12, 128, 128), (2, 12, 512, 512), (512, 30522), (512, 50257)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
PEERS = pytest.mark.parametrize("peer", ["llmengine", "torch"])
ROOMS = {"llmengine": functional, "torch": torch_functional}


@PEERS
@SHAPE
def bench_forward(side_by_side, peer, dtype, shape):
    x = torch.randn(shape).to(dtype)
    calls = {name: lambda room=room: room.softmax(x, -1) for name, room in ROOMS.items()}
    side_by_side(peer, calls, bytes_moved=2 * x.numel() * x.element_size())


@pytest.mark.parametrize("peer", ["llmengine", "torch", "copy"])
@SHAPE
def bench_forward_backward(side_by_side, peer, dtype, shape):
    x = torch.randn(shape).to(dtype)
    call = copies(x, 2) if peer == "copy" else forward_backward(lambda x: ROOMS[peer].softmax(x, -1), x)
    side_by_side(peer, {peer: call}, bytes_moved=5 * x.numel() * x.element_size())
