"""Cross-entropy of a linear layer's logits, which are never held whole: schemas, fake kernels, autograd.

Kernels see `input` as (tokens, d), `linear_weight` as (classes, d), `target` as int64 (tokens,). The forward keeps one
log-sum-exp a token; the backward forms the logits again, block by block. What holds for targets, losses and statistics
in ops/cross_entropy.py holds here; what for dtypes of parameters in ops/ffn.py.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define


def _forward_fake(input, linear_weight, linear_bias, target, weight, reduction, *options):
    lse = input.new_empty(input.shape[0], dtype=statistics_dtype(input))
    return lse.new_empty(lse.shape if reduction == "none" else ()), lse, lse.new_empty(())


def _backward_fake(
    grad_loss, input, linear_weight, linear_bias, target, weight, lse, normaliser, reduction, ignore_index,
    label_smoothing, z_loss, softcap, wanted,
):  # fmt: skip
    gradients = (
        (input.shape, input.dtype),
        (linear_weight.shape, linear_weight.dtype),
        (linear_weight.shape[:1], statistics_dtype(input)),
    )
    return tuple(
        input.new_empty(shape if want else (0,), dtype=dtype)
        for (shape, dtype), want in zip(gradients, wanted, strict=True)
    )


# lse: each token's log-sum-exp, 0 where it is ignored. normaliser: what the sum was divided by: for "mean" the sum of
# the targets' weights (the count of labels without weights), otherwise 1.
linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? weight, str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap)"
    " -> (Tensor loss, Tensor lse, Tensor normaliser)",
    _forward_fake,
)
# grad_loss: (tokens,) for "none", otherwise (). wanted: a flag for each gradient; the others come back empty.
linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor lse, Tensor normaliser, str reduction, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
    _backward_fake,
)


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy(input): -> loss. Class weights are constants, as in PyTorch."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, *options):
        loss, lse, normaliser = linear_cross_entropy_forward(
            input, linear_weight, linear_bias, target, weight, *options
        )
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, lse, normaliser)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        wanted = list(ctx.needs_input_grad[:3])
        grad_input, grad_weight, grad_bias = linear_cross_entropy_backward(
            grad_loss, *ctx.saved_tensors, *ctx.options, wanted
        )
        return (
            grad_input if wanted[0] else None,
            grad_weight if wanted[1] else None,
            grad_bias.to(ctx.saved_tensors[2].dtype) if wanted[2] else None,
            *(None,) * (2 + len(ctx.options)),
        )
