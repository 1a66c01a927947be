"""Layer norm and RMS norm, forward and backward, beside torch.nn.functional."""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

SHAPES = [(8, 768), (512, 768), (4096, 768), (4096, 4096)]


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("operator", ["layer_norm", "rms_norm"])
def bench_forward_backward(side_by_side, peer, dtype, operator, shape):
    x, w, b = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    parameters = (w, b) if operator == "layer_norm" else (w,)

    def call(room):
        function = getattr(room, operator)
        return forward_backward(lambda x, *parameters: function(x, shape[1:], *parameters), x, *parameters)

    calls = {"llmengine": call(functional), "torch": call(torch_functional)}
    side_by_side(peer, calls, bytes_moved=5 * x.numel() * x.element_size())


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_residual_add(side_by_side, peer, dtype, shape):
    x, r, w, b = (torch.randn(s).to(dtype) for s in (shape, shape, shape[1:], shape[1:]))

    def plain(x, r, w, b):
        return torch_functional.layer_norm(x + r, shape[1:], w, b)

    def ours(x, r, w, b):
        return functional.add_layer_norm(x, r, shape[1:], w, b)

    calls = {"llmengine": forward_backward(ours, x, r, w, b), "torch": forward_backward(plain, x, r, w, b)}
    side_by_side(peer, calls, bytes_moved=8 * x.numel() * x.element_size())
