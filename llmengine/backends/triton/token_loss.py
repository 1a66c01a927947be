"""What the losses of rows of logits have in common (csrc/ops/cross_entropy.h): a token's loss and gradient from its
log-sum-exp, and the reduction of the losses by one program, in a fixed order and without the host waiting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Losses that the reducing program reads at once.
BLOCK = 4096


@triton.jit
def token_loss(
    largest, total, target_logit, weighted, target, weight, weight_sum, classes, kept, share, z_loss, inside
):
    """(loss, log-sum-exp) of tokens whose logits z have the maximum `largest` and sum_c exp(z_c - largest) = total.

    weighted: sum_c w_c z_c, or None without label smoothing e; kept is 1 - e, share e / C. weight and weight_sum are
    pointers, or None for weights of 1. NaN for a target that is no class.
    """
    log_total = tl.log(total)
    lse = largest + log_total
    # not lse - z: where a token is nearly certain, the sum's logarithm is far smaller than the logits
    loss = kept * target_weight(weight, target, classes, inside) * (log_total + (largest - target_logit))
    if weighted is not None:
        if weight_sum is not None:
            weights = tl.load(weight_sum)
        else:
            weights = classes * 1.0
        loss += share * (weights * log_total + (weights * largest - weighted))
    loss += z_loss * lse * lse
    known = (target >= 0) & (target < classes)
    return tl.where(known, loss, float("nan")), lse


@triton.jit
def gradient_factors(
    grad_loss, normaliser, target, weight, weight_sum, lse, classes, kept, share, z_loss, labelled, inside
):
    """(probability, smoothing, picked) of tokens: dloss / dz_c = p_c probability - w_c smoothing - [c = target] picked.

    grad_loss: each token's. All 0 for tokens without a label, NaN for a target that is no class.
    """
    divisor = tl.load(normaliser)
    scale = grad_loss * tl.where(divisor == 0.0, 0.0, 1.0 / divisor)
    known = (target >= 0) & (target < classes)
    scale = tl.where(labelled, tl.where(known, scale, float("nan")), 0.0)
    picked = kept * target_weight(weight, target, classes, inside)
    if weight_sum is not None:
        weights = tl.load(weight_sum)
    else:
        weights = classes * 1.0
    probability = picked + share * weights + 2.0 * z_loss * tl.where(labelled, lse, 0.0)
    return scale * probability, scale * share, scale * picked


@triton.jit
def logits_gradient(
    z, column, classes, label, lse, probability, smoothing, picked, weight, softcap,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient with respect to the logits before the softcap; z: those after it, column: their classes.

    Rows of tokens without a label are left to the caller.
    """
    grad = tl.exp(z - lse[:, None]) * probability[:, None]
    if SMOOTHED:
        if weight is not None:
            grad -= tl.load(weight + column, column < classes, 0.0)[None, :] * smoothing[:, None]
        else:
            grad -= smoothing[:, None]
    grad -= tl.where(column[None, :] == label[:, None], picked[:, None], 0.0)
    if CAPPED:
        grad *= 1.0 - (z / softcap) * (z / softcap)
    return grad


@triton.jit
def target_weight(weight, target, classes, inside):
    if weight is not None:
        return tl.load(weight + target, inside & (target >= 0) & (target < classes), 0.0)
    else:
        return 1.0


@triton.jit
def _reduce(
    losses, target, weight, loss, normaliser, rows, classes, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """In float64: a few thousand additions, and no rounding of a sum that every token enters."""
    total = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(losses + row, row < rows, 0.0).to(tl.float64)
        if MEAN:
            label = tl.load(target + row, row < rows, ignore_index)
            labelled = (row < rows) & (label != ignore_index)
            one = tl.where(labelled, target_weight(weight, label, classes, labelled), 0.0)
            weights += one.to(tl.float64)
    sum_of_losses = tl.sum(total, 0)
    if MEAN:
        divisor = tl.sum(weights, 0)
        tl.store(normaliser, divisor.to(tl.float32))
        tl.store(loss, tl.where(divisor == 0.0, 0.0, sum_of_losses / divisor).to(tl.float32))
    else:
        tl.store(normaliser, 1.0)
        tl.store(loss, sum_of_losses.to(tl.float32))


def reduce_losses(losses, target, weight, classes, reduction, ignore_index):
    """(loss, normaliser) of the operators' contract."""
    normaliser = losses.new_empty(())
    if reduction == "none":
        return losses, normaliser.fill_(1.0)
    loss = torch.empty_like(normaliser)
    _reduce[(1,)](
        losses, target, weight, loss, normaliser, losses.shape[0], classes, ignore_index, reduction == "mean", BLOCK,
        num_warps=8,
    )  # fmt: skip
    return loss, normaliser


def smoothing_shares(label_smoothing, classes):
    """(kept, share): what a token's own class keeps of it, and what each class gets."""
    return 1.0 - label_smoothing, label_smoothing / max(classes, 1)


def class_weights(weight, label_smoothing):
    """(float32 weights, their sum where label smoothing asks for it), each a tensor or None."""
    if weight is None:
        return None, None
    weight = weight.float().contiguous()
    return weight, weight.sum() if label_smoothing > 0 else None
