"""Cases of the linear layer: with and without bias, odd sizes, no tokens, one element."""

from __future__ import annotations

import torch

from llmengine.functional.linear import products
from llmengine.testing.sample import Operator, Sample


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    samples = []
    for shape, out in [
        ((5, 24), 40), ((1, 1), 1), ((11, 7), 5), ((2, 3, 17), 33), ((130, 65), 129), ((70, 300), 400), ((0, 8), 16),
        ((3, 8), 0), ((64,), 70), ((33, 600), 30),
    ]:  # fmt: skip
        for bias in (True, False):
            args = (randn(*shape), randn(out, shape[-1], scale=max(shape[-1], 1) ** -0.5))
            samples.append(Sample(f"{shape} to {out}{' bias' * bias}", args, {"bias": randn(out)} if bias else {}))
    return samples


OPERATORS = [Operator("linear", products, _samples, torch.nn.functional.linear)]
