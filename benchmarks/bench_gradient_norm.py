"""The norm of a model's gradients beside torch.nn.utils.get_total_norm. Limit: memory, one read of the gradients."""

from __future__ import annotations

import pytest
import torch
from bench_adamw import MODELS, shapes

from llmengine.optim import gradient_norm

PEERS = {"llmengine": gradient_norm, "torch": lambda g: torch.nn.utils.get_total_norm(g, foreach=True)}


@pytest.mark.parametrize("peer", list(PEERS))
@pytest.mark.parametrize("model", list(MODELS))
def bench_norm(side_by_side, peer, dtype, model):
    gradients = [torch.randn(shape).to(dtype) for shape in shapes(model)]
    moved = sum(g.numel() * g.element_size() for g in gradients)
    side_by_side(peer, {peer: lambda: PEERS[peer](gradients)}, bytes_moved=moved)
