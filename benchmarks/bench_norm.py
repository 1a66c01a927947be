"""Layer norm and RMS norm, forward and backward, beside torch.nn.functional, and beside copying as many bytes.

The forward reads x and writes the result, the backward reads x and the result's gradient and writes x's: five times x's
bytes. A residual is read and the sum is written, too: seven times.
"""

from __future__ import annotations

import pytest
import torch
from conftest import copies, forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

SHAPES = [(8, 768), (512, 768), (4096, 768), (4096, 4096)]


@pytest.mark.parametrize("peer", ["llmengine", "torch", "copy"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("operator", ["layer_norm", "rms_norm"])
def bench_forward_backward(side_by_side, peer, dtype, operator, shape):
    x, w, b = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    parameters = (w, b) if operator == "layer_norm" else (w,)

    def call(room):
        function = getattr(room, operator)
        return forward_backward(lambda x, *parameters: function(x, shape[1:], *parameters), x, *parameters)

    calls = {"llmengine": call(functional), "torch": call(torch_functional), "copy": copies(x, 2)}
    side_by_side(peer, calls, bytes_moved=5 * x.numel() * x.element_size())


@pytest.mark.parametrize("peer", ["llmengine", "torch", "copy"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_residual_add(side_by_side, peer, dtype, shape):
    x, r, w, b = (torch.randn(s).to(dtype) for s in (shape, shape, shape[1:], shape[1:]))

    def plain(x, r, w, b):
        return torch_functional.layer_norm(x + r, shape[1:], w, b)

    def ours(x, r, w, b):
        return functional.add_layer_norm(x, r, shape[1:], w, b)

    calls = {"llmengine": forward_backward(ours, x, r, w, b), "torch": forward_backward(plain, x, r, w, b)}
    calls["copy"] = copies(x, 3)
    side_by_side(peer, calls, bytes_moved=7 * x.numel() * x.element_size())
