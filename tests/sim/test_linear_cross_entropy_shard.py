"""Linear cross-entropy of a shard of the classes in CUDA's kernels, in the simulator: the samples that every backend's
laws are tried on, targets of other shards, several spans and blocks of classes, tiles without labels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine.backends.cuda import linear_cross_entropy as cuda
from llmengine.backends.cuda.native import products_by
from llmengine.ops import linear_cross_entropy_shard as ops
from llmengine.testing import Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples.linear_cross_entropy_shard import OPERATORS

from .harness import device_of, places_of_products, schedule

HALVES = (torch.bfloat16, torch.float16)
(OPERATOR,) = OPERATORS


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


@pytest.mark.parametrize("sample", OPERATOR.samples()[::3], ids=lambda sample: sample.name)
@pytest.mark.parametrize("backend, core", places_of_products())
def test_samples(sample: Sample, backend: str, core: str):
    dtype = HALVES[len(sample.name) % 2]
    given = sample.on(device_of(backend)).rounded(dtype)
    oracle = evaluate(OPERATOR.function, given.rounded(torch.float64), "reference")
    plain = evaluate(OPERATOR.plain, given, None)
    with poison(), products_by(core):
        ours = evaluate(OPERATOR.function, given, backend)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name} {dtype}: loss")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name} {dtype}: grad {key}")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_a_shard_tells_and_its_gradients(core: str, smoothing: float, monkeypatch):
    """Of labels that it has, that another has, and none at all; two spans, and blocks of one tile, of the classes."""
    monkeypatch.setattr(cuda, "block_of", lambda *_: (cuda.TILE, cuda.TILE))
    monkeypatch.setattr(cuda, "spans_of", lambda *_: 2)
    tokens, d, classes = 270, 24, 600
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(tokens, d, generator=g), torch.randn(classes, d, generator=g) / 4
    bias, weight = torch.randn(classes, generator=g), torch.rand(classes, generator=g)
    target = torch.randint(classes, (tokens,), generator=g)
    target[::3], target[::7], target[128:260] = classes, ops.IGNORED, ops.IGNORED
    for dtype in HALVES:
        tensors = (x.to(dtype), w.to(dtype), bias.to(dtype), target, weight)
        options = (ops.IGNORED, smoothing, 8.0)
        factors = torch.rand(3, tokens, generator=g)
        told: dict[str, Tensor] = {}
        made: dict[str, tuple] = {}
        for backend in ("reference", "cuda_sim"):
            with llmengine.backend(backend), poison():
                told[backend] = ops.linear_cross_entropy_shard_forward(*tensors, *options)
            largest, total = told["reference"][:2]
            lse = torch.where(target == ops.IGNORED, 0.0, largest + total.log())
            scaled = factors * torch.tensor([1.0, smoothing / classes, 1.0])[:, None]
            with llmengine.backend(backend), poison():
                made[backend] = ops.linear_cross_entropy_shard_backward(
                    *tensors, lse, scaled, *options, None, [True] * 3
                )
        torch.testing.assert_close(told["cuda_sim"], told["reference"], rtol=2e-5, atol=2e-5)
        ignored = told["cuda_sim"][:, target == ops.IGNORED]
        assert ignored[0].eq(-torch.inf).all() and not ignored[1:].any()
        assert not told["cuda_sim"][2, target == classes].any()
        for ours, exact in zip(made["cuda_sim"], made["reference"], strict=True):
            torch.testing.assert_close(ours, exact, rtol=2**-7, atol=2**-8 * float(exact.abs().max()))
