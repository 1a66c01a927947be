"""Cross-entropy on the CPU: csrc/cpu/kernels/cross_entropy.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, scalar, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _refuses_forward(input, target, weight, *_):
    return refuses_tensors(input, target, weight)


def _refuses_backward(grad_loss, input, target, weight, *_):
    return refuses_tensors(grad_loss, input, target, weight)


def _class_weights(weight):
    return None if weight is None else weight.float().contiguous()


@kernel(KERNELS, "cross_entropy_forward", _refuses_forward)
def cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap):
    rows = input.shape[0]
    losses, lse = torch.empty(rows), torch.empty(rows)
    loss = losses if reduction == "none" else scalar()
    normaliser = scalar()
    module.cross_entropy_forward(
        input=unit_last_stride(input), target=contiguous(target), weight=_class_weights(weight), reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses,
        lse=lse, loss=None if reduction == "none" else loss, normaliser=normaliser,
    )  # fmt: skip
    return loss, lse, normaliser


@kernel(KERNELS, "cross_entropy_backward", _refuses_backward)
def cross_entropy_backward(
    grad_loss, input, target, weight, lse, normaliser, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    grad_input = input.new_empty(*input.shape)
    module.cross_entropy_backward(
        grad_loss=grad_loss, input=unit_last_stride(input), target=contiguous(target), weight=_class_weights(weight),
        lse=lse, normaliser=normaliser, reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, grad_input=grad_input,
    )  # fmt: skip
    return grad_input
