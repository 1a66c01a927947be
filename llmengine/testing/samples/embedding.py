"""Cases of the embedding: ids that recur, once and hundreds of times, padding, scales, odd and wide rows, no ids."""

from __future__ import annotations

import torch
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.testing.sample import Operator, Sample

# (rows, columns) of the table, shape of the ids
CASES = [
    ((11, 24), (7,)), ((50, 64), (3, 5)), ((5, 7), (40,)), ((3, 1), (2, 2)), ((1, 130), (35,)), ((9, 515), (2, 3, 2)),
    ((600, 16), (33,)), ((4, 1030), (9,)), ((6, 8), ()), ((6, 8), (0,)), ((6, 8), (2, 0)), ((6, 0), (4,)),
]  # fmt: skip


def plain(input, weight, padding_idx=None, *, scale=1.0):
    rows = torch_functional.embedding(input, weight, padding_idx)
    return rows if scale == 1.0 else rows * scale


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def table(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def ids(rows, *shape):
        return torch.randint(rows, shape, generator=g)

    samples = [
        Sample(f"{shape} of {ids_shape}", (ids(shape[0], *ids_shape), table(*shape))) for shape, ids_shape in CASES
    ]
    samples.append(Sample("padding", (ids(5, 30), table(5, 20)), {"padding_idx": 3}))
    samples.append(Sample("padding from the end", (ids(5, 30), table(5, 20)), {"padding_idx": -5}))
    samples.append(Sample("nothing but padding", (torch.full((20,), 2), table(5, 20)), {"padding_idx": 2}))
    samples.append(Sample("scaled", (ids(9, 4, 6), table(9, 40)), {"scale": 22.5, "padding_idx": 0}))
    samples.append(Sample("two ids of many tokens", (ids(2, 700), table(2, 12))))
    frequent = torch.cat([torch.full((300,), 7), torch.arange(20), torch.full((33,), 12)])
    samples.append(Sample("frequent", (frequent[torch.randperm(353, generator=g)], table(20, 72))))
    samples.append(Sample("int32", (ids(8, 10).int(), table(8, 16))))
    return samples


OPERATORS = [Operator("embedding", functional.embedding, _samples, plain)]
