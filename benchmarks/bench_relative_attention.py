"""Relative attention beside the eager formula, on the shapes of XLNet-base: 12 heads of 64, a batch of sequences.

The eager peer is what frameworks run: three batched products for the scores, the shift of the position scores by
padding and reshaping, a masked softmax of the whole matrix. It is given padded batches of full length, so that neither
side computes padding. Floating-point operations are those of the three products with the scores that both must make.
"""

from __future__ import annotations

import pytest
import torch
from conftest import forward_backward
from torch import Tensor

from llmengine import functional

# name: (batch, length, memory)
SHAPES = {"xlnet": (2, 512, 0), "memory": (2, 512, 384), "short": (8, 128, 0)}
HEADS, HEAD_DIM = 12, 64
PASSES = ["forward", "both"]


def shifted(scores: Tensor, keys: int) -> Tensor:
    """(batch, heads, rows, distances), from the largest distance on -> (batch, heads, rows, keys)."""
    batch, heads, rows, distances = scores.shape
    scores = scores.reshape(batch, heads, distances, rows)[:, :, 1:].reshape(batch, heads, rows, distances - 1)
    return scores[..., :keys]


def eager(query, key, value, position_key, content_bias, position_bias, segment_bias, segment_key, hidden, other):
    """query (batch, rows, heads, head_dim), position_key from the largest distance on; one-hot `other`."""
    keys = key.shape[1]
    content = torch.einsum("bihd,bjhd->bhij", query + content_bias, key)
    position = shifted(torch.einsum("bihd,rhd->bhir", query + position_bias, position_key), keys)
    segment = torch.einsum("bihd,shd->bhis", query + segment_bias, segment_key)
    segment = torch.einsum("bijs,bhis->bhij", other, segment)
    scores = (content + position + segment) * HEAD_DIM**-0.5 - 1e30 * hidden
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), value)


def operands(shape, dtype):
    batch, length, memory = shape
    keys = memory + length
    tokens = [(batch, n, HEADS, HEAD_DIM) for n in (length, keys, keys)]
    lines = [(keys + length, HEADS, HEAD_DIM), *[(HEADS, HEAD_DIM)] * 3, (2, HEADS, HEAD_DIM)]
    return [torch.randn(s).to(dtype) for s in (*tokens, *lines)]


@pytest.mark.parametrize("peer", ["llmengine", "eager"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", SHAPES)
def bench_content_stream(side_by_side, peer, dtype, name, which):
    batch, length, memory = shape = SHAPES[name]
    keys = memory + length
    tensors = operands(shape, dtype)
    ranks = torch.stack([torch.cat([torch.full((memory,), -1), torch.randperm(length)]) for _ in range(batch)]).int()
    segments = (torch.arange(keys) >= memory + length // 2).int()
    cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (length, keys))
    numbers = {
        "query_segments": segments[memory:].repeat(batch), "key_segments": segments.repeat(batch),
        "query_ranks": ranks[:, memory:].flatten(), "key_ranks": ranks.flatten(),
    }  # fmt: skip

    def ours(query, key, value, position_key, content_bias, position_bias, segment_bias, segment_key):
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        return functional.relative_attention(
            q, k, v, position_key[1:].flip(0), content_bias, position_bias, cu_q, cu_k, length, keys,
            zero_distance=length - 1, segment_bias=segment_bias, segment_key=segment_key, include_self=True, **numbers,
        )  # fmt: skip

    oneself = torch.arange(length)[:, None] + memory == torch.arange(keys)
    hidden = ~((ranks[:, None, :] < ranks[:, memory:, None]) | oneself)
    other = torch.nn.functional.one_hot((segments[memory:, None] != segments).long(), 2).expand(batch, -1, -1, -1)
    given = (hidden[:, None].to(dtype), other.to(dtype))
    calls = {"llmengine": ours, "eager": lambda *tensors: eager(*tensors, *given)}
    if dtype == torch.float32:  # eager scores lose more in bfloat16
        torch.testing.assert_close(ours(*tensors), calls["eager"](*tensors).flatten(0, 1), atol=1e-4, rtol=1e-4)
    flops = 6 * batch * HEADS * length * keys * HEAD_DIM * (1.0 if which == "forward" else 3.0)
    timed = {
        name: forward_backward(f, *tensors) if which == "both" else lambda f=f: f(*tensors) for name, f in calls.items()
    }
    side_by_side(peer, timed, flops=flops)
