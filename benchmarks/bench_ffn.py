"""The feed-forward block, forward and with its backward, beside nn.functional's linear and activation."""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

D, F = 768, 3072


def plain(x, w_up, w_down, b_up, b_down):
    hidden = torch_functional.gelu(torch_functional.linear(x, w_up, b_up))
    return torch_functional.linear(hidden, w_down, b_down)


def ours(x, w_up, w_down, b_up, b_down):
    return functional.ffn(x, w_up, w_down, b_up=b_up, b_down=b_down)


def plain_gated(x, w_up, w_down, w_gate):
    hidden = torch_functional.silu(torch_functional.linear(x, w_gate)) * torch_functional.linear(x, w_up)
    return torch_functional.linear(hidden, w_down)


def ours_gated(x, w_up, w_down, w_gate):
    return functional.ffn(x, w_up, w_down, w_gate=w_gate, activation="silu")


def tensors(tokens: int, dtype: torch.dtype, gated: bool) -> list[torch.Tensor]:
    x, w_up, w_down = torch.randn(tokens, D), torch.randn(F, D) / 28, torch.randn(D, F) / 55
    rest = [torch.randn(F, D) / 28] if gated else [torch.randn(F), torch.randn(D)]
    return [t.to(dtype) for t in (x, w_up, w_down, *rest)]


def flops(tokens: int, gated: bool, backward: bool) -> float:
    return 2.0 * tokens * D * F * (3 if gated else 2) * (3 if backward else 1)


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [512, 2048])
def bench_forward(side_by_side, peer, dtype, tokens, gated):
    arguments = tensors(tokens, dtype, gated)
    functions = (ours_gated, plain_gated) if gated else (ours, plain)

    @torch.no_grad()
    def call(function):
        return function(*arguments)

    calls = {name: lambda f=f: call(f) for name, f in zip(("llmengine", "torch"), functions, strict=True)}
    side_by_side(peer, calls, flops=flops(tokens, gated, False))


@pytest.mark.parametrize("peer", ["llmengine", "torch"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [512, 2048])
def bench_forward_backward(side_by_side, peer, dtype, tokens, gated):
    arguments = tensors(tokens, dtype, gated)
    functions = {"llmengine": ours_gated if gated else ours, "torch": plain_gated if gated else plain}
    calls = {peer: forward_backward(functions[peer], *arguments)}
    side_by_side(peer, calls, flops=flops(tokens, gated, True))
