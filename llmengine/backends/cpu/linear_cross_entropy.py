"""Cross-entropy of a linear layer on the CPU: csrc/cpu/kernels/linear_cross_entropy.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


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
    label_smoothing, z_loss, softcap, wanted,
):  # fmt: skip
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes = (input.dtype, linear_weight.dtype, torch.float32)
    gradients = [
        torch.empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    given = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    sums = given[0] if given[0] is None or input.dtype == torch.float32 else torch.empty(input.shape)
    module.linear_cross_entropy_backward(
        grad_loss=grad_loss, **_inputs(input, linear_weight, linear_bias, target, weight), lse=lse,
        normaliser=normaliser, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, sums=sums, grad_input=given[0], grad_linear_weight=given[1],
        grad_linear_bias=given[2],
    )  # fmt: skip
    return tuple(gradients)
