"""Cross-entropy of rows of logits against class indices: schemas, fake kernels, autograd.

Kernels see `input` as (rows, classes) and `target` as int64 (rows,); a target outside [0, classes) that is not
ignore_index is a ValueError from the kernel on a CPU (a GPU kernel never waits to say so: it gives NaN). Losses and
statistics are float32 on every backend (float64 for float64 inputs).
"""

from __future__ import annotations

from torch.autograd.function import once_differentiable

from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import Function, define

REDUCTIONS = ("none", "mean", "sum")


def _forward_fake(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap):
    lse = input.new_empty(input.shape[0], dtype=statistics_dtype(input))
    scalar = lse.new_empty(())
    return lse.new_empty(lse.shape if reduction == "none" else ()), lse, scalar


def _backward_fake(grad_loss, input, *_):
    return input.new_empty(input.shape)


# lse: each row's log-sum-exp. normaliser: what the sum was divided by: for "mean" the sum of the targets' weights (the
# count of labels without weights), otherwise 1.
cross_entropy_forward = define(
    "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap) -> (Tensor loss, Tensor lse, Tensor normaliser)",
    _forward_fake,
)
# grad_loss: (rows,) for "none", otherwise ().
cross_entropy_backward = define(
    "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor lse,"
    " Tensor normaliser, str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap)"
    " -> Tensor grad_input",
    _backward_fake,
)


class CrossEntropy(Function):
    """cross_entropy(input): -> loss. Weights are constants, as in PyTorch."""

    @staticmethod
    def forward(ctx, input, target, weight, *options):
        loss, lse, normaliser = cross_entropy_forward(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, lse, normaliser)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.options), *(None,) * 7
