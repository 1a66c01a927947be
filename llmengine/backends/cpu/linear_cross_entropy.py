"""Cross-entropy of a linear layer on the CPU: csrc/cpu/kernels/linear_cross_entropy.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}
CLASS_BLOCK = 1536  # csrc/ops/linear_cross_entropy.h


def _forward_refuses(input, linear_weight, linear_bias, target, weight, *_):
    return refuses_tensors(input, linear_weight, linear_bias, target, weight)


def _backward_refuses(grad_loss, input, linear_weight, linear_bias, target, weight, *_):
    return refuses_tensors(grad_loss, input, linear_weight, linear_bias, target, weight)


def _inputs(input, linear_weight, linear_bias, target, weight):
    return {
        "input": unit_last_stride(input),
        "linear_weight": unit_last_stride(linear_weight),
        "linear_bias": contiguous(linear_bias),
        "target": contiguous(target),
        "weight": None if weight is None else weight.float().contiguous(),
    }


def _gradients(input, linear_weight, wanted):
    """As the operator returns them, and as the kernel takes them."""
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes = (input.dtype, linear_weight.dtype, torch.float32)
    gradients = [
        torch.empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    return gradients, [g if want else None for g, want in zip(gradients, wanted, strict=True)]


@kernel(KERNELS, "linear_cross_entropy_forward", _forward_refuses)
def linear_cross_entropy_forward(
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    losses, lse = torch.empty(input.shape[0]), torch.empty(input.shape[0])
    loss = losses if reduction == "none" else torch.empty(())
    normaliser = torch.empty(())
    module.linear_cross_entropy_forward(
        **_inputs(input, linear_weight, linear_bias, target, weight), reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses, lse=lse,
        loss=None if reduction == "none" else loss, normaliser=normaliser,
    )  # fmt: skip
    return loss, lse, normaliser


@kernel(KERNELS, "linear_cross_entropy_backward", _backward_refuses)
def linear_cross_entropy_backward(
    grad_loss, input, linear_weight, linear_bias, target, weight, lse, normaliser, reduction, ignore_index,
    label_smoothing, z_loss, softcap, _gradient_filter, wanted,
):  # fmt: skip
    gradients, given = _gradients(input, linear_weight, wanted)
    sums = given[0] if given[0] is None or input.dtype == torch.float32 else torch.empty(input.shape)
    module.linear_cross_entropy_backward(
        grad_loss=grad_loss, **_inputs(input, linear_weight, linear_bias, target, weight), lse=lse,
        normaliser=normaliser, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, sums=sums, grad_input=given[0], grad_linear_weight=given[1],
        grad_linear_bias=given[2],
    )  # fmt: skip
    return tuple(gradients)


def _with_gradients_refuses(input, linear_weight, linear_bias, target, weight, reduction, *others):
    if reduction == "none" or others[3] > 0:
        return "gradients are made with the loss only for a mean or sum, without a softcap"
    return refuses_tensors(input, linear_weight, linear_bias, target, weight)


@kernel(KERNELS, "linear_cross_entropy_with_gradients", _with_gradients_refuses)
def linear_cross_entropy_with_gradients(
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap,
    block_tokens, wanted,
):  # fmt: skip
    gradients, given = _gradients(input, linear_weight, wanted)
    losses, loss = torch.empty(input.shape[0]), torch.empty(())
    columns = -(-linear_weight.shape[0] // CLASS_BLOCK) * CLASS_BLOCK
    module.linear_cross_entropy_with_gradients(
        **_inputs(input, linear_weight, linear_bias, target, weight), reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses, lse=torch.empty_like(losses),
        loss=loss, normaliser=torch.empty(()), grad_input=given[0], grad_linear_weight=given[1],
        grad_linear_bias=given[2],
        block=torch.empty(block_tokens, columns, dtype=input.dtype),
    )  # fmt: skip
    return loss, *gradients
