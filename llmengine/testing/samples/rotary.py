"""Cases of the rotary embedding: both kinds of pairs, whole and partly turned heads, slices of a packed projection."""

from __future__ import annotations

import torch

from llmengine import functional
from llmengine.testing.sample import Operator, Sample

# (shape of the input, R)
CASES = [
    ((9, 3, 16), 16), ((2, 7, 2, 64), 64), ((33, 1, 80), 32), ((5, 4, 7), 6), ((2, 3, 11, 2, 10), 4), ((1, 1, 2), 2),
    ((6, 2, 66), 66), ((4, 2, 130), 126), ((5, 3, 8), 0), ((0, 3, 8), 8), ((4, 0, 8), 8), ((0, 5, 3, 8), 4),
    ((200, 12, 64), 64), ((3, 2, 1), 0),
]  # fmt: skip


def plain(input, cos, sin, *, interleaved=False):
    """The usual formula, in the tables' dtype: x cos + turned(x) sin, turned being a quarter of a circle."""
    features = 2 * cos.shape[1]
    x = input[..., :features].to(cos.dtype)
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        turned = torch.cat([-x[..., features // 2 :], x[..., : features // 2]], -1)
    y = (x * cos[:, None] + turned * sin[:, None]).to(input.dtype)
    return torch.cat([y, input[..., features:]], -1)


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def sample(name, input, features, interleaved):
        tokens = input.shape[-3]
        angles = 6 * torch.rand(tokens, features // 2, generator=g, dtype=torch.float64)
        tables = (angles.cos(), angles.sin())
        return Sample(name, (input, *tables), {"interleaved": interleaved}, constants=(1, 2), float32_stays=(1, 2))

    samples = []
    for interleaved in (False, True):
        for shape, features in CASES:
            kind = "interleaved" if interleaved else "halves"
            input = torch.randn(shape, generator=g, dtype=torch.float64)
            samples.append(sample(f"{kind} {features} of {shape}", input, features, interleaved))
        qkv = torch.randn(2, 20, 3, 4, 24, generator=g, dtype=torch.float64)
        samples.append(sample(f"{kind}, a slice of a projection", qkv[:, :, 1], 24, interleaved))
    return samples


OPERATORS = [Operator("rotary_embedding", functional.rotary_embedding, _samples, plain, node="rotary")]
