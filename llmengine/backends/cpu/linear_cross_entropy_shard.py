"""Linear cross-entropy of a shard of the classes on the CPU: csrc/cpu/kernels/linear_cross_entropy.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.linear_cross_entropy import gradients_of, inputs_of, refuses, sums_of
from llmengine.backends.cpu.native import module
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@kernel(KERNELS, "linear_cross_entropy_shard_forward", refuses)
def linear_cross_entropy_shard_forward(
    input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap
):
    statistics = torch.empty(4, input.shape[0])
    module.linear_cross_entropy_shard_forward(
        **inputs_of(input, linear_weight, linear_bias, target, weight), ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap, statistics=statistics,
    )  # fmt: skip
    return statistics


@kernel(KERNELS, "linear_cross_entropy_shard_backward", refuses)
def linear_cross_entropy_shard_backward(
    input, linear_weight, linear_bias, target, weight, lse, factors, ignore_index, label_smoothing, softcap, main,
    wanted,
):  # fmt: skip
    gradients, given = gradients_of(input, linear_weight, wanted, main)
    module.linear_cross_entropy_shard_backward(
        **inputs_of(input, linear_weight, linear_bias, target, weight), ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap, lse=lse, factors=factors, sums=sums_of(input, given[0]),
        grad_input=given[0], grad_linear_weight=given[1], grad_linear_bias=given[2],
        add_linear_weight=main is not None,
    )  # fmt: skip
    return gradients
