"""Cross-entropy of rows, written out from its formula (csrc/ops/cross_entropy.h)."""

from __future__ import annotations

import torch

from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def check_targets(op: str, target: torch.Tensor, classes: int, ignore_index: int) -> torch.Tensor:
    """Which rows have a label; ValueError where one lies outside [0, classes)."""
    valid = target != ignore_index
    wrong = valid & ((target < 0) | (target >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: target {int(target[row])} at row {row} is out of range; "
            f"allowed: 0 to {classes - 1} ({classes} classes) or ignore_index {ignore_index}"
        )
    return valid


def capped(x, softcap):
    return softcap * (x / softcap).tanh() if softcap > 0 else x


def _log_sum_exp(z):
    """NaN for +inf, where torch.logsumexp gives +inf: there is no distribution."""
    largest = z.amax(1)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    return shift + (z - shift[:, None]).exp().sum(1).log()


@kernel(KERNELS, "cross_entropy_forward")
def cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap):
    rows, classes = input.shape
    valid = check_targets("cross_entropy", target, classes, ignore_index)
    z = capped(_wide(input), softcap)
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    lse = _log_sum_exp(z) if classes else z.new_full((rows,), -torch.inf)
    index = torch.where(valid, target, 0)
    if not rows or not bool(valid.any()):
        losses, weights = torch.zeros_like(lse), torch.zeros_like(lse)
    else:
        weights = torch.where(valid, w[index], 0.0)
        picked = lse - z.gather(1, index[:, None]).squeeze(1)
        losses = (1.0 - label_smoothing) * w[index] * picked
        if label_smoothing > 0:
            losses = losses + label_smoothing / classes * (w * (lse[:, None] - z)).sum(1)
        if z_loss > 0:
            losses = losses + z_loss * lse.square()
        losses = torch.where(valid, losses, 0.0)
    if reduction == "none":
        return losses, lse, lse.new_ones(())
    normaliser = weights.sum() if reduction == "mean" else lse.new_ones(())
    return torch.where(normaliser == 0, 0.0, losses.sum() / normaliser), lse, normaliser


@kernel(KERNELS, "cross_entropy_backward")
def cross_entropy_backward(
    grad_loss, input, target, weight, lse, normaliser, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    rows, classes = input.shape
    if not rows or not classes:
        return torch.zeros_like(input)
    wide = _wide(input)
    z = capped(wide, softcap)
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    valid = target != ignore_index
    index = torch.where(valid, target, 0)
    picked = (1.0 - label_smoothing) * w[index]
    smooth = label_smoothing / classes * w
    p = (z - lse[:, None]).exp()
    grad = p * (picked + smooth.sum() + 2.0 * z_loss * lse)[:, None] - smooth
    grad = grad - torch.nn.functional.one_hot(index, classes) * picked[:, None]
    scale = grad_loss.to(z.dtype).expand(rows) * torch.where(normaliser == 0, 0.0, 1.0 / normaliser)
    grad = grad * scale[:, None]
    if softcap > 0:
        grad = grad * (1.0 - (z / softcap).square())
    return torch.where(valid[:, None], grad, 0.0).to(input.dtype)
