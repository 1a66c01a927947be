"""Cross-entropy of a linear layer with its gradients, of logits that are formed once and kept in 16 bits: some tokens
after the others, of each the products by whoever multiplies for a linear layer (cuBLAS, or csrc/cuda/gemm.cu) and
between them csrc/cuda/cross_entropy.cu, whose gradient takes the logits' place.

flops    6 tokens d classes, where forward and backward that form the logits twice have 8
bytes    beside the products' operands and results 6 a logit, and 8 an element of a weight's float32 gradient for each
         block of tokens but the first
memory   2 a logit of a block

Wide gradients are in float32. Those of float16's logits may then be anything that float16 holds: they are scaled by a
power of two to just below its largest number, whatever the loss's gradient will be, and the sums scaled back, for 8
bytes an element. Plain PyTorch leaves that to the loss's scale, which is not known here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine.backends.buffers import empty_gradients
from llmengine.backends.cuda.cross_entropy import class_weights
from llmengine.backends.cuda.native import Native, parameter, parts_of, unit_last_stride

LARGEST = torch.finfo(torch.float16).max


def loss_with_gradients(
    native: Native, input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss,
    softcap, block_tokens, wide_gradients, wanted,
):  # fmt: skip
    tokens, classes, wide = input.shape[0], linear_weight.shape[0], torch.float32
    x: Tensor = rows_of(input)
    head: Tensor = rows_of(linear_weight.to(input.dtype))
    core = native.core_of("linear", x, head, backward=True)
    labels, options = target.contiguous(), {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    options |= {"z_loss": z_loss, "softcap": softcap, **class_weights(weight, label_smoothing)}
    dtypes = (wide, wide) if wide_gradients else (x.dtype, linear_weight.dtype)
    kinds = ((x.shape, dtypes[0]), (linear_weight.shape, dtypes[1]), ((classes,), wide))
    gradients = grad_input, grad_weight, grad_bias = empty_gradients(x, kinds, wanted, {})
    losses, lse = x.new_empty(tokens, dtype=wide), x.new_empty(tokens, dtype=wide)
    one, divisor = losses.new_ones(()), divisor_of(labels, weight, classes, ignore_index)
    scale = torch.where(divisor == 0, 0.0, 1.0 / divisor).to(wide) if reduction == "mean" else one
    lifted = wide_gradients and x.dtype == torch.float16
    lift = lift_of(weight, classes, z_loss, softcap, one) if lifted else None
    # rows of whole vectors, which TMA fetches
    room = x.new_empty(min(block_tokens, tokens), -(-classes // 8) * 8)[:, :classes]

    def multiply(a, b, out, bias=None, *, add=False):
        if core is not None:
            native.call(
                "gemm", x, a=a, b=b, a2=None, b2=None, bias=bias, added=out if add else None, out=out,
                **native.products(x, core),
            )  # fmt: skip
        elif bias is None:
            native.product_into(out, a, b, add=add)
        else:
            torch.addmm(bias.to(out.dtype), a, b, out=out)

    for first in range(0, tokens, len(room)):
        rows = slice(first, min(first + len(room), tokens))
        logits, of_rows = room[: rows.stop - first], {"target": labels[rows], "lse": lse[rows]} | options
        multiply(x[rows], head.T, logits, parameter(linear_bias, x))
        native.call(
            "cross_entropy_forward", x, input=logits, **of_rows, reduction="none", losses=losses[rows], loss=None,
            normaliser=losses.new_empty(()),
        )  # fmt: skip
        native.call(
            "cross_entropy_backward", x, grad_loss=scale if lift is None else lift, input=logits, **of_rows,
            reduction="sum", normaliser=one, grad_input=logits,
        )  # fmt: skip
        if wanted[0]:
            multiply(logits, head, grad_input[rows])
        if wanted[1]:
            multiply(logits.T, x[rows], grad_weight, add=first > 0)
        if wanted[2]:
            sums = grad_bias if first == 0 else torch.empty_like(grad_bias)
            partial = sums.new_empty(parts_of(len(logits)), classes)
            native.call("column_sums", x, rows=logits, partial=partial, sums=sums)
            if first > 0:
                grad_bias += sums
    if lift is not None:
        for gradient in gradients:
            gradient.mul_(scale / lift)
    loss = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        loss = torch.where(divisor == 0, 0.0, loss / divisor)
    return loss.to(wide), *gradients


def rows_of(matrix: Tensor) -> Tensor:
    rows = unit_last_stride(matrix)
    assert rows is not None
    return rows


def lift_of(weight, classes, z_loss, softcap, one):
    """A power of two that keeps gradients of the sum of losses, times it, within half of float16's numbers: they are
    at most the largest class weight and, by z_loss, twice its log-sum-exp's."""
    largest = one if weight is None else torch.where(weight.isfinite(), weight.abs(), 0).max().float()
    lse = (min(softcap, LARGEST) if softcap > 0 else LARGEST) + math.log(classes)
    most = (largest + 2 * z_loss * lse).clamp(min=2.0**-64)
    return torch.exp2(torch.floor(torch.log2(LARGEST / 2 / most)))


def divisor_of(labels, weight, classes, ignore_index):
    """What a mean is divided by, in float64."""
    labelled = labels != ignore_index
    if weight is None:
        return labelled.sum(dtype=torch.float64)
    return torch.where(labelled, weight[labels.clamp(0, classes - 1)], 0.0).sum(dtype=torch.float64)
