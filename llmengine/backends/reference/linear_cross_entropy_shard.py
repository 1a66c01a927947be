"""Linear cross-entropy of a shard of the classes, written out from its formulas (csrc/ops/linear_cross_entropy.h)."""

from __future__ import annotations

import torch

from llmengine.backends.reference.cross_entropy import capped
from llmengine.backends.reference.linear_cross_entropy import gradients_of, logits_of
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@kernel(KERNELS, "linear_cross_entropy_shard_forward")
def linear_cross_entropy_shard_forward(
    input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap
):
    z = capped(logits_of(input, linear_weight, linear_bias), softcap)
    tokens, classes = z.shape
    labelled, own = target != ignore_index, (target >= 0) & (target < classes)
    largest = z.amax(1)
    total = (z - torch.where(largest == -torch.inf, 0.0, largest)[:, None]).exp().sum(1)
    of_target = torch.where(own, z.gather(1, torch.where(own, target, 0)[:, None]).squeeze(1), 0.0)
    weighted = z.new_zeros(tokens)
    if label_smoothing > 0:
        weighted = (z if weight is None else z * weight.to(z.dtype)).sum(1)
    nothing = z.new_tensor([-torch.inf, 0.0, 0.0, 0.0])
    return torch.where(labelled, torch.stack([largest, total, of_target, weighted]), nothing[:, None])


@kernel(KERNELS, "linear_cross_entropy_shard_backward")
def linear_cross_entropy_shard_backward(
    input, linear_weight, linear_bias, target, weight, lse, factors, ignore_index, label_smoothing, softcap, main,
    wanted,
):  # fmt: skip
    z = capped(logits_of(input, linear_weight, linear_bias), softcap)
    classes = z.shape[1]
    probability, smoothing, picked = factors[:, :, None]
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    grad = (z - lse[:, None]).exp() * probability - w * smoothing
    grad = grad - torch.where(torch.arange(classes, device=z.device) == target[:, None], picked, 0.0)
    if softcap > 0:
        grad = grad * (1.0 - (z / softcap).square())
    grad = torch.where((target != ignore_index)[:, None], grad, 0.0)
    return gradients_of(grad, input, linear_weight, main, wanted)
