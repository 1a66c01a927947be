"""Cross-entropy of a linear layer on the CPU: csrc/cpu/kernels/linear_cross_entropy.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import destinations, empty_gradients
from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}
CLASS_BLOCK = 1536  # csrc/ops/linear_cross_entropy.h


def refuses(input, linear_weight, linear_bias, target, weight, *_):
    return refuses_tensors(input, linear_weight, linear_bias, target, weight)


def _backward_refuses(grad_loss, input, linear_weight, linear_bias, target, weight, *_):
    return refuses_tensors(grad_loss, input, linear_weight, linear_bias, target, weight)


def inputs_of(input, linear_weight, linear_bias, target, weight):
    return {
        "input": unit_last_stride(input),
        "linear_weight": unit_last_stride(linear_weight),
        "linear_bias": contiguous(linear_bias),
        "target": contiguous(target),
        "weight": None if weight is None else weight.float().contiguous(),
    }


def gradients_of(input, linear_weight, wanted, main=None):
    """As the operator returns them, and as the kernel takes them."""
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes = (input.dtype, linear_weight.dtype, torch.float32)
    gradients = empty_gradients(input, tuple(zip(shapes, dtypes, strict=True)), wanted, {1: main})
    return gradients, destinations(gradients, wanted, {1: main})


def sums_of(input, grad_input):
    """Where the input's gradient gathers in float32."""
    return grad_input if grad_input is None or input.dtype == torch.float32 else torch.empty(input.shape)


@kernel(KERNELS, "linear_cross_entropy_forward", refuses)
def linear_cross_entropy_forward(
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    losses, lse = torch.empty(input.shape[0]), torch.empty(input.shape[0])
    loss = losses if reduction == "none" else torch.empty(())
    normaliser = torch.empty(())
    module.linear_cross_entropy_forward(
        **inputs_of(input, linear_weight, linear_bias, target, weight), reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses, lse=lse,
        loss=None if reduction == "none" else loss, normaliser=normaliser,
    )  # fmt: skip
    return loss, lse, normaliser


@kernel(KERNELS, "linear_cross_entropy_backward", _backward_refuses)
def linear_cross_entropy_backward(
    grad_loss, input, linear_weight, linear_bias, target, weight, lse, normaliser, reduction, ignore_index,
    label_smoothing, z_loss, softcap, _gradient_filter, main, wanted,
):  # fmt: skip
    gradients, given = gradients_of(input, linear_weight, wanted, main)
    module.linear_cross_entropy_backward(
        grad_loss=grad_loss, **inputs_of(input, linear_weight, linear_bias, target, weight), lse=lse,
        normaliser=normaliser, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, sums=sums_of(input, given[0]), grad_input=given[0], grad_linear_weight=given[1],
        grad_linear_bias=given[2], add_linear_weight=main is not None,
    )  # fmt: skip
    return gradients


def _with_gradients_refuses(input, linear_weight, linear_bias, target, weight, reduction, *others):
    if reduction == "none" or others[3] > 0:
        return "gradients are made with the loss only for a mean or sum, without a softcap"
    if others[-2]:
        return "gradients are made with the loss in the dtypes of what they belong to"
    return refuses_tensors(input, linear_weight, linear_bias, target, weight)


@kernel(KERNELS, "linear_cross_entropy_with_gradients", _with_gradients_refuses)
def linear_cross_entropy_with_gradients(
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap,
    block_tokens, _wide, wanted,
):  # fmt: skip
    gradients, given = gradients_of(input, linear_weight, wanted)
    losses, loss = torch.empty(input.shape[0]), torch.empty(())
    columns = -(-linear_weight.shape[0] // CLASS_BLOCK) * CLASS_BLOCK
    module.linear_cross_entropy_with_gradients(
        **inputs_of(input, linear_weight, linear_bias, target, weight), reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses, lse=torch.empty_like(losses),
        loss=loss, normaliser=torch.empty(()), grad_input=given[0], grad_linear_weight=given[1],
        grad_linear_bias=given[2],
        block=torch.empty(block_tokens, columns, dtype=input.dtype),
    )  # fmt: skip
    return loss, *gradients
