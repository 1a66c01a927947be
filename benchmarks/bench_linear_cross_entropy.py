"""Cross-entropy of a vocabulary's linear layer, beside nn.functional's linear and cross_entropy.

PyTorch's own linear_cross_entropy is no peer on CPUs (several times slower than its two parts). Where only some tokens
have labels, as in masked language modelling, "selected" is PyTorch at its best: it picks them before the linear layer.
"""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward
from torch.nn import functional as torch_functional

from llmengine import functional

D = 768
CASES = {
    "bert-masked": (512, 30522, 0.15), "bert-all": (512, 30522, 1.0), "gpt2-all": (512, 50257, 1.0),
    "gpt2-long": (2048, 50257, 1.0),
}  # fmt: skip


def inputs(case: str, dtype: torch.dtype):
    tokens, classes, share = CASES[case]
    torch.manual_seed(0)
    target = torch.randint(classes, (tokens,))
    target[int(tokens * share) :] = -100
    target = target[torch.randperm(tokens)]
    x, w, b = torch.randn(tokens, D), torch.randn(classes, D) / 28, torch.randn(classes)
    return [t.to(dtype) for t in (x, w, b)], target, int(tokens * share)


def functions(target: torch.Tensor):
    def ours(x, w, b):
        return functional.linear_cross_entropy(x, w, target, linear_bias=b)

    def plain(x, w, b):
        return torch_functional.cross_entropy(torch_functional.linear(x, w, b).float(), target)

    def selected(x, w, b):
        labelled = target != -100
        return torch_functional.cross_entropy(torch_functional.linear(x[labelled], w, b).float(), target[labelled])

    return {"llmengine": ours, "torch": plain, "selected": selected}


def peers(case: str) -> list[str]:
    return ["llmengine", "torch", *(["selected"] if CASES[case][2] < 1 else [])]


PEERS = [pytest.param(case, peer, id=f"{case}-{peer}") for case in CASES for peer in peers(case)]


@pytest.mark.parametrize("case, peer", PEERS)
def bench_forward(side_by_side, dtype, case, peer):
    arguments, target, labelled = inputs(case, dtype)
    function = functions(target)[peer]

    @torch.no_grad()
    def call():
        return function(*arguments)

    side_by_side(peer, {peer: call}, flops=2.0 * labelled * D * arguments[1].shape[0])


@pytest.mark.parametrize("case, peer", PEERS)
def bench_forward_backward(side_by_side, dtype, case, peer):
    arguments, target, labelled = inputs(case, dtype)
    calls = {peer: forward_backward(functions(target)[peer], *arguments)}
    side_by_side(peer, calls, flops=6.0 * labelled * D * arguments[1].shape[0])
