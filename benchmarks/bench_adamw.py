"""AdamW's step beside torch.optim's (fused, foreach, compiled): shapes of GPT-2 124M and, many and small, of BERT-mini.

Limit: memory. Bytes an element: float32 28 (weight, gradient, both moments read; all but the gradient written),
bfloat16 weights with float32 masters and moments 30, all bfloat16 14. `copy` is what copying as many bytes takes.
"""

from __future__ import annotations

import pytest
import torch

from llmengine.optim import AdamW

# name -> (vocabulary, positions, width, feed-forward, layers)
MODELS = {"gpt2": (50257, 1024, 768, 3072, 12), "mini": (30522, 512, 256, 1024, 4)}


def shapes(model: str) -> list[tuple[int, ...]]:
    vocabulary, positions, width, wide, layers = MODELS[model]
    matrices = [(3 * width, width), (width, width), (wide, width), (width, wide)]
    lines = [(3 * width,), (width,), (wide,), (width,), *[(width,)] * 4]
    return [(vocabulary, width), (positions, width), *[*matrices, *lines] * layers, (width,), (width,)]


def parameters(model: str, dtype: torch.dtype) -> list[torch.Tensor]:
    made = [torch.randn(shape).mul_(0.02).to(dtype).requires_grad_() for shape in shapes(model)]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


KINDS = {
    "fp32": (torch.float32, 28, {}),
    "bf16_masters": (torch.bfloat16, 30, {"master_weights": True}),
    "bf16": (torch.bfloat16, 14, {}),
    "bf16_stochastic": (torch.bfloat16, 14, {"stochastic_rounding": True}),
}


@pytest.mark.parametrize("peer", ["llmengine", "fused", "foreach", "compiled", "copy"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("model", list(MODELS))
def bench_step(side_by_side, peer, kind, model):
    dtype, element, options = KINDS[kind]
    given = parameters(model, dtype)
    moved = element * sum(p.numel() for p in given)

    def optimizer_step(peer: str):
        if peer == "llmengine":
            return AdamW(given, lr=1e-4, **options).step
        # PyTorch has no masters in the optimizer: what it is compared with is a step on float32 weights
        weights = given if kind != "bf16_masters" else parameters(model, torch.float32)
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=peer == "fused", foreach=peer != "fused")
        return torch.compile(optimizer.step) if peer == "compiled" else optimizer.step

    def copying():
        source = torch.ones(moved // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    side_by_side(peer, {peer: copying() if peer == "copy" else optimizer_step(peer)}, bytes_moved=moved)
