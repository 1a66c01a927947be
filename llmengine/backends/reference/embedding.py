"""Embedding, written out from its formula (csrc/ops/embedding.h)."""

from __future__ import annotations

import torch

from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _check_ids(op: str, input: torch.Tensor, rows: int) -> None:
    wrong = ((input < 0) | (input >= rows)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"{op}: input holds {int(input[place])} at place {place}; allowed: 0 to {rows - 1} (weight has {rows} rows)"
        )


@kernel(KERNELS, "embedding_forward")
def embedding_forward(input, weight, scale):
    _check_ids("embedding", input, weight.shape[0])
    return (_wide(weight[input]) * scale).to(weight.dtype)


@kernel(KERNELS, "embedding_backward")
def embedding_backward(grad_output, input, rows, padding_idx, scale):
    _check_ids("embedding backward", input, rows)
    wide = _wide(grad_output)
    sums = wide.new_zeros((rows, wide.shape[1])).index_add_(0, input, wide) * scale
    if padding_idx >= 0:
        sums[padding_idx] = 0
    return sums.to(grad_output.dtype)
