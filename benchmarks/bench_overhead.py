"""What a call costs before any work is done: rows of 8x8, so small that only the way to the kernel counts. On a GPU,
where a hundred calls are waited for at once, that is what it takes to launch them."""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

CALLS = 100  # per measurement: one alone is shorter than the clock is sure


def hundred(call):
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("operator", ["layer_norm", "softmax", "cross_entropy", "scaled_dot_product_attention"])
def bench_hundred_calls(side_by_side, peer, operator, direction):
    x, w, b, target = torch.randn(8, 8), torch.randn(8), torch.randn(8), torch.arange(8)
    tensors = (x, w, b) if operator == "layer_norm" else (x,)

    def call(room):
        function = {
            "layer_norm": lambda x, w, b: room.layer_norm(x, (8,), w, b),
            "softmax": lambda x: room.softmax(x, -1),
            "cross_entropy": lambda x: room.cross_entropy(x, target),
            "scaled_dot_product_attention": lambda x: room.scaled_dot_product_attention(*[x.view(1, 1, 8, 8)] * 3),
        }[operator]
        return hundred(forward_backward(function, *tensors) if "backward" in direction else lambda: function(*tensors))

    side_by_side(peer, {"llmengine": call(functional), "torch": call(torch_functional)})
