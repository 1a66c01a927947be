"""Cases of the norms: odd and one-element widths, no rows, large means, with and without parameters, dropout."""

from __future__ import annotations

import torch
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.testing.sample import Operator, Sample

SHAPES = [(4, 64), (3, 5, 33), (1, 1), (2, 1), (7, 200), (0, 8), (5, 1025)]


def _norm_samples(with_bias: bool) -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    samples = []
    for shape in SHAPES:
        parameters = (randn(shape[-1]), randn(shape[-1]))[: 1 + with_bias]
        samples.append(Sample(f"{shape}", (randn(*shape), (shape[-1],), *parameters), {"eps": 1e-5}))
    samples.append(Sample("no parameters", (randn(4, 40), (40,)), {"eps": 1e-12}))
    samples.append(Sample("weight only", (randn(4, 40), (40,), randn(40)), {"eps": 1e-5}))
    samples.append(Sample("two dimensions", (randn(3, 4, 6), (4, 6), randn(4, 6)), {"eps": 1e-5}))
    samples.append(Sample("large mean", (randn(6, 48) + 1000.0, (48,), randn(48)), {"eps": 1e-5}))
    samples.append(Sample("equal elements", (torch.full((2, 32), 3.0).double(), (32,), randn(32)), {"eps": 1e-5}))
    return samples


def _add_samples(with_bias: bool) -> list[Sample]:
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [
        Sample(
            f"{shape} p={p}",
            (randn(*shape), randn(*shape), (shape[-1],), randn(shape[-1]), *([randn(shape[-1])] * with_bias)),
            {"eps": 1e-5, "dropout_p": p},
        )
        for shape in SHAPES
        for p in (0.0, 0.3)
    ]


OPERATORS = [
    Operator(
        "layer_norm", functional.layer_norm, lambda: _norm_samples(True), torch_functional.layer_norm, node="norm"
    ),
    Operator("rms_norm", functional.rms_norm, lambda: _norm_samples(False), torch_functional.rms_norm, node="norm"),
    Operator("add_layer_norm", functional.add_layer_norm, lambda: _add_samples(True), node="norm"),
    Operator("add_rms_norm", functional.add_rms_norm, lambda: _add_samples(False), node="norm"),
]
