"""Cases of the linear layer in 8-bit floats: both scalings, sizes about the edges of blocks and rows, outliers, zeros,
no tokens, one element."""

from __future__ import annotations

import torch

from llmengine.functional import fp8_linear
from llmengine.testing.sample import Operator, Sample


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    samples = []
    for number, (shape, out) in enumerate(
        [((5, 24), 40), ((1, 1), 1), ((2, 3, 17), 33), ((130, 65), 129), ((70, 300), 140), ((0, 8), 16), ((64,), 70)]
    ):
        for scaling in ("tensor", "block"):
            x = randn(*shape)
            if x.numel() > 1000:
                x[..., 3] *= 300  # outliers of one block
                x[..., 10, :] = 0
            options = {"scaling": scaling} | ({"grad_format": "e4m3"} if number % 3 == 2 else {})
            args = (x, randn(out, shape[-1], scale=max(shape[-1], 1) ** -0.5))
            bias = {"bias": randn(out)} if number % 2 == 0 else {}
            samples.append(Sample(f"{shape} to {out} {scaling}{' bias' * bool(bias)}", args, bias | options))
    return samples


OPERATORS = [Operator("fp8_linear", fp8_linear, _samples, rounds=True)]
