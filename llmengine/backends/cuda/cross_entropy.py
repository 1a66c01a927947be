"""Cross-entropy in CUDA: csrc/cuda/cross_entropy.cu."""

from __future__ import annotations

import torch

from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(input, target, weight, *_):
        return native.refuses_tensors(input, target, weight)

    def backward_refuses(grad_loss, input, target, weight, *_):
        return native.refuses_tensors(grad_loss, input, target, weight)

    @kernel(table, "cross_entropy_forward", forward_refuses)
    def cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap):
        losses, lse = (input.new_empty(input.shape[0], dtype=torch.float32) for _ in range(2))
        loss = losses if reduction == "none" else losses.new_empty(())
        normaliser = losses.new_empty(())
        native.call(
            "cross_entropy_forward", input, input=unit_last_stride(input), target=target.contiguous(),
            **class_weights(weight, label_smoothing), reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses, lse=lse,
            loss=None if reduction == "none" else loss, normaliser=normaliser,
        )  # fmt: skip
        return loss, lse, normaliser

    @kernel(table, "cross_entropy_backward", backward_refuses)
    def cross_entropy_backward(
        grad_loss, input, target, weight, lse, normaliser, reduction, ignore_index, label_smoothing, z_loss, softcap
    ):
        grad_input = input.new_empty(input.shape)
        native.call(
            "cross_entropy_backward", input, grad_loss=grad_loss, input=unit_last_stride(input),
            target=target.contiguous(), **class_weights(weight, label_smoothing), lse=lse, normaliser=normaliser,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, grad_input=grad_input,
        )  # fmt: skip
        return grad_input

    return table


def class_weights(weight, label_smoothing):
    """The weights in float32, and their sum where label smoothing asks for it."""
    if weight is None:
        return {"weight": None, "weight_sum": None}
    weight = weight.float().contiguous()
    return {"weight": weight, "weight_sum": weight.sum() if label_smoothing > 0 else None}
