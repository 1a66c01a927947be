"""Rows of a table by token id: schemas, fake kernels, autograd.

Kernels see `input` as int64 (tokens,) and `weight` as (rows, columns). An id that is no row is a ValueError from the
kernel on a CPU; a GPU kernel never waits to say so: there its output is NaN, and no gradient comes of it. Semantics:
csrc/ops/embedding.h.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.ops.registry import define

embedding_forward = define(
    "embedding_forward(Tensor input, Tensor weight, float scale) -> Tensor output",
    lambda input, weight, scale: weight.new_empty((input.shape[0], weight.shape[1])),
)
# padding_idx: the row whose gradient is zero, -1 for none.
embedding_backward = define(
    "embedding_backward(Tensor grad_output, Tensor input, SymInt rows, int padding_idx, float scale)"
    " -> Tensor grad_weight",
    lambda grad_output, input, rows, *_: grad_output.new_empty((rows, grad_output.shape[1])),
)


class Embedding(torch.autograd.Function):
    """embedding(input, weight): -> output. The gradient of weight is dense."""

    @staticmethod
    def forward(ctx, input, weight, padding_idx, scale):
        ctx.save_for_backward(input)
        ctx.rows, ctx.padding_idx, ctx.scale = weight.shape[0], padding_idx, scale
        return embedding_forward(input, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        return None, embedding_backward(grad_output, input, ctx.rows, ctx.padding_idx, ctx.scale), None, None
