"""Attention over a cache on the CPU: csrc/cpu/kernels/decode_attention.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _refuses(query, key_cache, value_cache, *_):
    return refuses_tensors(query, key_cache, value_cache)


@kernel(KERNELS, "decode_attention", _refuses)
def decode_attention(
    query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, distance_bias, sinks, window_left, scale,
    softcap,
):  # fmt: skip
    output, lse = empty_rows_first(query, value_cache.shape[3]), torch.empty(query.shape[:3])
    module.decode_attention(
        query=unit_last_stride(query), key_cache=unit_last_stride(key_cache), value_cache=unit_last_stride(value_cache),
        cache_lengths=contiguous(cache_lengths), block_table=contiguous(block_table), alibi_slopes=alibi_slopes,
        distance_bias=contiguous(distance_bias), sinks=contiguous(sinks), window_left=window_left, scale=scale,
        softcap=softcap, output=output, lse=lse,
    )  # fmt: skip
    return output, lse
