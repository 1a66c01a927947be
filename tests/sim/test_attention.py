"""CUDA attention (csrc/cuda/attention_sm80_*.cu) in the simulator: the samples that every backend's laws are tried on,
the edges of its tiles, layouts, equal bits under every schedule, refusals, and kernels with one line broken.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.testing import Operator, Sample, assert_law, evaluate, poison, simulator
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples import attention
from llmengine.testing.simulator import SCHEDULES
from .harness import built_with, loaded

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def scheduled(request):
    simulator.prepare(request.node.name)


def assert_right(op: Operator, sample: Sample, dtype: torch.dtype) -> None:
    """Outputs and gradients of query, key and value by the law."""
    constants = (3, *(k for k in ("attn_mask", "distance_bias") if k in sample.kwargs))
    given = dataclasses.replace(sample, constants=sample.constants + constants).rounded(dtype)
    oracle = evaluate(op.function, given.rounded(torch.float64), "reference")
    plain = evaluate(op.plain, given, None)
    with poison():
        ours = evaluate(op.function, given, "cuda_sim")
    for i, (y, p, o) in enumerate(zip(ours[0], plain[0], oracle[0], strict=True)):
        assert_law(y, p, o, OUTPUT, f"{sample.name} {dtype}: output {i}")
    for key in (0, 1, 2):
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name} {dtype}: grad {key}")


SDPA, VARLEN = attention.OPERATORS


def sample_of(name: str, rows: int, keys: int, dim: int, heads: int = 1, key_heads: int = 1, **options: Any) -> Sample:
    m = attention._Maker(rows + keys + dim)
    m.padded(name, 1, heads, rows, keys, dim, key_heads=key_heads, **options)
    return m.samples[0]


def cases() -> list:
    """A sixth of the samples, each in one dtype; the others on demand."""
    return [
        pytest.param(op, s, HALVES[i.bit_count() % 2], id=f"{op.name}-{s.name}", marks=[pytest.mark.heavy] * (i % 6 > 0))
        for op in attention.OPERATORS
        for i, s in enumerate(op.samples())
    ]


@pytest.mark.parametrize("op, sample, dtype", cases())
def test_samples_of_all_options(op: Operator, sample: Sample, dtype: torch.dtype):
    assert_right(op, sample, dtype)
