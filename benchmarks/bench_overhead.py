"""What a call costs before any work is done: layer_norm of 8x8, so small that only the way to the kernel counts."""

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
def bench_hundred_calls(side_by_side, peer, direction):
    x, w, b = torch.randn(8, 8), torch.randn(8), torch.randn(8)

    def call(room):
        def layer_norm(x, w, b):
            return room.layer_norm(x, (8,), w, b)

        return hundred(
            forward_backward(layer_norm, x, w, b) if "backward" in direction else lambda: layer_norm(x, w, b)
        )

    side_by_side(peer, {"llmengine": call(functional), "torch": call(torch_functional)})
