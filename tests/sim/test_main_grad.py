"""Weights' gradients that are added to float32 buffers, and pre-activations that are made again, in CUDA's kernels: of
linear layers, feed-forward blocks and linear cross-entropy, by every maker of products; AdamW that reads the buffers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llmengine
from llmengine import functional
from llmengine.backends.cuda import linear_cross_entropy as cuda
from llmengine.backends.cuda.native import products_by
from llmengine.functional.linear import products
from llmengine.optim import AdamW, MainGradients
from llmengine.testing import poison

from .harness import device_of, places, places_of_products, schedule

HALVES = (torch.bfloat16, torch.float16)
TOKENS, D, F, CLASSES = 140, 24, 72, 264


@pytest.fixture(autouse=True)
def scheduled(request, monkeypatch):
    schedule(request)
    monkeypatch.setattr(cuda, "block_of", lambda tokens, _: (tokens, cuda.TILE))  # one tile of classes


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TARGET = torch.arange(TOKENS) % CLASSES


def linear(x: Tensor, w: list[Tensor]) -> Tensor:
    return products(x, w[0]).square().sum()


def ffn(x: Tensor, w: list[Tensor], *, recompute: bool = True) -> Tensor:
    torch.manual_seed(0)
    blocks = {"w_gate": w[2], "b_up": w[0][:, 0].detach()} if len(w) > 2 else {}
    return functional.ffn(x, w[0], w[1], **blocks, activation="silu", dropout_p=0.1, recompute=recompute).square().sum()


def head(x: Tensor, w: list[Tensor]) -> Tensor:
    return functional.linear_cross_entropy(x, w[0], TARGET.to(x.device), label_smoothing=0.1, softcap=9.0)


def shard(x: Tensor, w: list[Tensor]) -> Tensor:
    """The classes from 8 on, as if the others were nowhere."""
    own = functional.VocabularyShard(8, CLASSES + 8, lambda *_: None)
    return functional.linear_cross_entropy(
        x, w[0], TARGET.to(x.device) + 7, label_smoothing=0.1, shard=own, ignore_index=7
    )


CASES = {
    "linear": (linear, [(F, D)]),
    "ffn": (ffn, [(F, D), (D, F)]),
    "gated": (ffn, [(F, D), (D, F), (F, D)]),
    "head": (head, [(CLASSES, D)]),
    "shard": (shard, [(CLASSES, D)]),
}


MAKERS = pytest.mark.parametrize("backend, maker", [*((place, "blas") for place in places()), *places_of_products()])


def weights(name: str, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    return [nn.Parameter((randn(*shape) / shape[1] ** 0.5).to(device, dtype)) for shape in CASES[name][1]]


@pytest.mark.parametrize("name", CASES)
@MAKERS
def test_buffers_grow_by_what_a_float32_weight_gets(backend: str, maker: str, name: str):
    """Whose gradient is not rounded either: the same bits, added to what was there."""
    for dtype in HALVES if maker == "sm80" else HALVES[:1]:
        x, loss = randn(TOKENS, D).to(device_of(backend), dtype), CASES[name][0]
        ours = weights(name, dtype, device_of(backend))
        wide = [nn.Parameter(w.detach().float()) for w in ours]
        MainGradients(ours)
        for w in ours:
            w.main_grad.fill_(0.25)
        with llmengine.backend(backend), products_by(maker), poison():
            loss(x, ours).backward()
            loss(x, wide).backward()
        for w, exact in zip(ours, wide, strict=True):
            assert w.grad is None and exact.grad.abs().max() > 1e-4
            if backend == "cuda" or maker == "blas":  # which may fuse the addition with a product
                torch.testing.assert_close(w.main_grad, exact.grad + 0.25, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(w.main_grad, exact.grad + 0.25)


@pytest.mark.parametrize("name", ["head", "shard"])
def test_blocks_of_tokens_follow_one_another_in_the_buffer(core: str, name: str, monkeypatch):
    monkeypatch.setattr(cuda, "block_of", lambda *_: (cuda.TILE, cuda.TILE))
    x, loss = randn(TOKENS, D).bfloat16(), CASES[name][0]
    ours = weights(name, torch.bfloat16, "cpu")
    wide = [nn.Parameter(w.detach().float()) for w in ours]
    MainGradients(ours)
    ours[0].main_grad.fill_(0.25)
    with llmengine.backend("cuda_sim"), poison():
        loss(x, ours).backward()
        loss(x, wide).backward()
    torch.testing.assert_close(ours[0].main_grad, wide[0].grad + 0.25, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ffn", "gated"])
@MAKERS
def test_recomputed_pre_activations_change_no_bit(backend: str, maker: str, name: str):
    for dtype in HALVES:
        x = randn(TOKENS, D).to(device_of(backend), dtype).requires_grad_()
        found = []
        with llmengine.backend(backend), products_by(maker):
            for recompute in (False, True):
                leaves = [x, *weights(name, dtype, device_of(backend))]
                with poison():
                    loss = ffn(x, leaves[1:], recompute=recompute)
                    found.append([loss, *torch.autograd.grad(loss, leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), dtype


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", places())
def test_adamw_reads_float32_gradients(backend: str, dtype: torch.dtype, masters: bool):
    ours = [nn.Parameter(randn(*shape).to(device_of(backend), dtype)) for shape in ((5, 7), (4097,), ())]
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    mains = MainGradients(ours)
    for main, p in zip(mains.gradients(), theirs, strict=True):
        p.grad = randn(*p.shape, 1).view(p.shape).to(p.device)
        main.copy_(p.grad)
    with llmengine.backend(backend):
        AdamW(ours, 0.1, master_weights=masters).step()
    torch.optim.AdamW(theirs, 0.1).step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=2**-7, atol=1e-5)
