"""Linear cross-entropy where each of several processes holds some of the classes: schemas, fake kernels, autograd.

A process's kernels say what its logits tell of each token (csrc/ops/linear_cross_entropy.h): the largest, the sum of
exponentials, the target's. Two reductions over the processes, of 4 and of 8 bytes a token (12 with label smoothing),
make of it what all logits tell: Megatron-LM's vocabulary-parallel loss (Narayanan et al. 2021), but of logits that are
never held. Losses, and the three factors of a token's gradient, are tensors of one number a token, made by PyTorch. The
backward needs no reduction but that of the input's gradient, to which every class adds.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_gradients
from llmengine.backends.reference.cross_entropy import check_targets
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define

IGNORED = -1
"""Kernels are given targets counted from the shard's first class, and the number of its classes for another shard's.
The caller's ignore_index could be one of these numbers, so that ignored tokens are told by this one."""


def _forward_fake(input, *_):
    return input.new_empty((4, input.shape[0]), dtype=statistics_dtype(input))


def _backward_fake(input, linear_weight, *others):
    line = (linear_weight.shape[:1], statistics_dtype(input))
    gradients = ((input.shape, input.dtype), (linear_weight.shape, linear_weight.dtype), line)
    return empty_gradients(input, gradients, others[-1], {1: others[-2]})


# target: IGNORED, a class of the shard, or the number of its classes; weight: of the shard's classes. (4, tokens): the
# largest logit, sum of exp(logit - largest), the target's logit or 0, and with label smoothing the sum of weight times
# logit; -inf, 0, 0, 0 of ignored tokens.
linear_cross_entropy_shard_forward = define(
    "linear_cross_entropy_shard_forward(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? weight, int ignore_index, float label_smoothing, float softcap) -> Tensor",
    _forward_fake,
)
# lse: over all classes, finite where ignored. factors (3, tokens): the gradient of a logit is p factors[0] - weight
# factors[1] - [it is the target's] factors[2]. main: see optim/main_grad.py.
linear_cross_entropy_shard_backward = define(
    "linear_cross_entropy_shard_backward(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? weight, Tensor lse, Tensor factors, int ignore_index, float label_smoothing, float softcap,"
    " Tensor(a!)? main, bool[] wanted) -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
    _backward_fake,
)


def sharded_loss(
    input, linear_weight, linear_bias, target, weight, shard, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    """(loss, what the backward is given of each token: target and class weights of the shard, lse, factors)."""
    rows, labelled = linear_weight.shape[0], target != ignore_index
    if target.is_cpu and type(target) is torch.Tensor and not torch.compiler.is_compiling():  # elsewhere NaN tells
        check_targets("linear_cross_entropy", target, shard.classes, ignore_index)
    known = (target >= 0) & (target < shard.classes)
    own = (target >= shard.first) & (target < shard.first + rows)
    local = torch.where(own, target - shard.first, rows).masked_fill(~labelled, IGNORED)
    local_weight = None if weight is None else weight[shard.first : shard.first + rows]
    tensors = (input, linear_weight, linear_bias, local, local_weight)
    most, total, of_target, weighted = _over_shards(tensors, shard, label_smoothing, softcap)

    wide = most.dtype
    log_total = total.log()
    lse = most + log_total
    weights = shard.classes if weight is None else weight.to(wide).sum()
    of_class = torch.ones_like(lse) if weight is None else weight.to(wide)[torch.where(known, target, 0)]
    picked, share = (1.0 - label_smoothing) * of_class, label_smoothing / max(shard.classes, 1)
    # not lse less a logit: where a token is nearly certain, the sum's logarithm is far smaller than the logits
    losses = picked * (log_total + (most - of_target))
    if label_smoothing > 0:
        losses = losses + share * (weights * log_total + (weights * most - weighted))
    losses = torch.where(labelled, torch.where(known, losses + z_loss * lse.square(), torch.nan), 0.0)
    lse = torch.where(labelled, lse, 0.0)
    probability = torch.where(known, picked + share * weights + 2.0 * z_loss * lse, torch.nan)
    factors = torch.stack([probability, torch.full_like(lse, share), picked])
    if reduction == "mean":
        divisor = torch.where(labelled, of_class, 0.0).sum(dtype=torch.float64).to(wide)
        factors = factors * torch.where(divisor == 0, 0.0, 1.0 / divisor)
    kept = local, local_weight, lse, factors
    if reduction == "none":
        return losses, *kept
    loss = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        loss = torch.where(divisor == 0, 0.0, loss / divisor)
    return loss.to(wide), *kept


def _over_shards(tensors, shard, label_smoothing, softcap):
    """What all shards together know of each token: the largest logit, and the sums that the kernel gives of one."""
    if tensors[1].shape[0]:
        known = linear_cross_entropy_shard_forward(*tensors, IGNORED, label_smoothing, softcap)
    else:
        known = _forward_fake(tensors[0]).zero_()
        known[0] = -torch.inf
    largest, sums = known[0], known[1:] if label_smoothing > 0 else known[1:3]
    most = largest.clone()
    if shard.reduce is not None:
        shard.reduce(most, "max")
    most = torch.where(most == -torch.inf, 0.0, most)
    sums = torch.cat([sums[:1] * (largest - most).exp(), sums[1:]])
    if shard.reduce is not None:
        shard.reduce(sums, "sum")
    return most, sums[0], sums[1], sums[2] if label_smoothing > 0 else None


class LinearCrossEntropyShard(torch.autograd.Function):
    """linear_cross_entropy(input): -> loss, the same in every process. The last option is the buffer for
    linear_weight's gradient."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, shard, *options):
        loss, *kept = sharded_loss(input, linear_weight, linear_bias, target, weight, shard, *options[:-1])
        ctx.save_for_backward(input, linear_weight, linear_bias, *kept)
        ctx.shard, ctx.options = shard, options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        input, linear_weight, linear_bias, target, weight, lse, factors = ctx.saved_tensors
        wanted, (*_, label_smoothing, _z_loss, softcap, main) = list(ctx.needs_input_grad[:3]), ctx.options
        if linear_weight.shape[0]:
            grad_input, grad_weight, grad_bias = linear_cross_entropy_shard_backward(
                input, linear_weight, linear_bias, target, weight, lse, factors * grad_loss, IGNORED, label_smoothing,
                softcap, main, wanted,
            )  # fmt: skip
        else:
            grad_input, grad_weight, grad_bias = (
                gradient.zero_() for gradient in _backward_fake(input, linear_weight, main, wanted)
            )
        if wanted[0] and ctx.shard.reduce is not None and ctx.shard.sum_input_gradient:
            sums = grad_input.to(statistics_dtype(input), copy=True).contiguous()
            ctx.shard.reduce(sums, "sum")
            grad_input = sums.to(input.dtype)
        return (
            grad_input if wanted[0] else None,
            grad_weight if wanted[1] and main is None else None,
            grad_bias.to(linear_bias.dtype) if wanted[2] else None,
            *(None,) * (3 + len(ctx.options)),
        )
