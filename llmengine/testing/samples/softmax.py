"""Cases of softmax: odd and one-element widths, every dimension, masked columns, fully masked and overflowing rows."""

from __future__ import annotations

import torch
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.testing.sample import Operator, Sample

CASES = [
    ((4, 64), -1), ((3, 5, 33), -1), ((1, 1), 1), ((2, 1), 0), ((7, 200), 1), ((0, 8), 1), ((3, 0), 1), ((5, 1025), -1),
    ((4, 6, 10), 0), ((4, 6, 10), 1), ((2, 3, 4, 5), -2), ((17,), 0), ((), 0), ((3, 4099), 1),
]  # fmt: skip


def plain(input, dim, dtype=None):
    """PyTorch's, with the zeros of a fully masked row where it has NaN."""
    masked = (input == -torch.inf).all(dim, keepdim=True) if input.ndim else input == -torch.inf
    output = torch_functional.softmax(torch.where(masked, 0.0, input), dim, dtype=dtype)
    return torch.where(masked, 0.0, output)


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    samples = [Sample(f"{shape} dim {dim}", (2 * randn(*shape), dim)) for shape, dim in CASES]
    masked = randn(6, 40)
    masked[:, 20:] = -torch.inf
    masked[1] = -torch.inf
    masked[2, 1:] = -torch.inf
    samples.append(Sample("masked", (masked, 1)))
    samples.append(Sample("masked columns", (masked, 0)))
    samples.append(Sample("large", (1e4 * randn(4, 50), 1)))
    samples.append(Sample("equal", (torch.full((3, 48), -7.0).double(), 1)))
    samples.append(Sample("growing", (torch.arange(600.0).double()[None], 1)))
    return samples


OPERATORS = [Operator("softmax", functional.softmax, _samples, plain)]
