"""Cases of linear cross-entropy of a shard that has all classes and is given as one: the kernels and the arithmetic of
shards, without other processes (tests/test_linear_cross_entropy_shard.py has some)."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmengine import functional
from llmengine.testing.sample import Operator, Sample
from llmengine.testing.samples import linear_cross_entropy


def plain(*args, shard, **options):
    return linear_cross_entropy.plain(*args, **options)


def _samples() -> list[Sample]:
    """Every fifth of those of the whole, which meets each option; a shard without tokens, and one of one class."""
    whole = linear_cross_entropy.OPERATORS[0].samples()
    chosen = [whole[0], *whole[1:49:5], *whole[49:]]
    return [_as_shard(sample) for sample in chosen]


def _as_shard(sample: Sample) -> Sample:
    weight = sample.args[1]
    assert isinstance(weight, torch.Tensor)
    return replace(sample, kwargs=sample.kwargs | {"shard": functional.VocabularyShard(0, len(weight))})


OPERATORS = [
    Operator(
        "linear_cross_entropy", functional.linear_cross_entropy, _samples, plain, node="linear_cross_entropy_shard"
    )
]
