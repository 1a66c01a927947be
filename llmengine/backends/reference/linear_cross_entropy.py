"""Cross-entropy of a linear layer: its logits, whole and in float32, through the reference cross-entropy."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import added
from llmengine.backends.reference.cross_entropy import check_targets, cross_entropy_backward, cross_entropy_forward
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def logits_of(input, linear_weight, linear_bias):
    x = _wide(input)
    logits = x @ _wide(linear_weight).to(x.dtype).T
    return logits if linear_bias is None else logits + _wide(linear_bias).to(x.dtype)


@kernel(KERNELS, "linear_cross_entropy_forward")
def linear_cross_entropy_forward(input, linear_weight, linear_bias, target, weight, reduction, ignore_index, *options):
    valid = check_targets("linear_cross_entropy", target, linear_weight.shape[0], ignore_index)
    logits = logits_of(input, linear_weight, linear_bias)
    loss, lse, normaliser = cross_entropy_forward(logits, target, weight, reduction, ignore_index, *options)
    return loss, torch.where(valid, lse, 0.0), normaliser


@kernel(KERNELS, "linear_cross_entropy_backward")
def linear_cross_entropy_backward(
    grad_loss, input, linear_weight, linear_bias, target, weight, lse, normaliser, reduction, ignore_index, *options
):
    *given, _gradient_filter, main, wanted = options
    logits = logits_of(input, linear_weight, linear_bias)
    grad_logits = cross_entropy_backward(
        grad_loss, logits, target, weight, lse, normaliser, reduction, ignore_index, *given
    )
    return gradients_of(grad_logits, input, linear_weight, main, wanted)


def gradients_of(grad_logits, input, linear_weight, main, wanted):
    wide = grad_logits.dtype
    gradients = (
        lambda: (grad_logits @ _wide(linear_weight).to(wide)).to(input.dtype),
        lambda: added(grad_logits.T @ _wide(input), main).to(linear_weight.dtype),
        lambda: grad_logits.sum(0),
    )
    dtypes = (input, linear_weight, grad_logits)
    return tuple(g() if want else like.new_empty(0) for g, like, want in zip(gradients, dtypes, wanted, strict=True))


@kernel(KERNELS, "linear_cross_entropy_with_gradients")
def linear_cross_entropy_with_gradients(input, linear_weight, linear_bias, target, weight, *options):
    *given, _block_tokens, wide, wanted = options
    if wide:
        input, linear_weight = _wide(input), _wide(linear_weight)
    tensors = (input, linear_weight, linear_bias, target, weight)
    loss, lse, normaliser = linear_cross_entropy_forward(*tensors, *given)
    rest = (lse, normaliser, *given, 0.0, None, wanted)
    return loss, *linear_cross_entropy_backward(torch.ones_like(loss), *tensors, *rest)
