"""Rows of a table by token id: schemas, fake kernels, autograd.

Kernels see `input` as int64 (tokens,) and `weight` as (rows, columns). An id that is no row is a ValueError from the
kernel on a CPU; a GPU kernel never waits to say so: there its output is NaN, and no gradient comes of it. Semantics:
csrc/ops/embedding.h.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.ops.registry import Function, define

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


class Embedding(Function):
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


class TiedWeight(Function):
    """A table as the weight of an output layer: -> the same weight. `lookups`: (ids, gradients of their rows) of the
    table's lookups, which are added into the output layer's gradient when that has come."""

    @staticmethod
    def forward(ctx, weight, lookups):
        ctx.lookups, ctx.rows, ctx.dtype = lookups, weight.shape[0], weight.dtype
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        lookups = ctx.lookups[:]
        ctx.lookups.clear()
        if grad is not None and not grad.is_contiguous():
            grad = grad.contiguous()
        for ids, rows in lookups:
            if grad is None:
                grad = embedding_backward(rows, ids, ctx.rows, -1, 1.0).to(ctx.dtype)
                continue
            # Of an id's rows the sum, at the first of them, is rounded once; at the others is 0. No list of ids without
            # their repetitions is made, for whose length the host would wait.
            places = torch.arange(len(ids), device=ids.device)
            first = ids.new_zeros(ctx.rows).scatter_reduce_(0, ids, places, "amin", include_self=False)
            grad.index_add_(0, ids, embedding_backward(rows, first[ids], len(ids), -1, 1.0).to(grad.dtype))
        return grad, None


class TiedLookup(Function):
    """lookup(weight, ids) of TiedWeight's output: -> rows. Autograd runs TiedWeight's backward after all of these."""

    @staticmethod
    def forward(ctx, weight, ids, padding_idx, lookups):
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.lookups = padding_idx, lookups
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        ids, rows = ctx.saved_tensors[0].reshape(-1).long(), grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx)[:, None], 0.0)
        ctx.lookups.append((ids, rows))
        return None, None, None, None
