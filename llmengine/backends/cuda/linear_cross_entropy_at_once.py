"""Cross-entropy of a linear layer with its gradients, of logits that are formed once and kept in 16 bits: some tokens
after the others, of each the products by whoever multiplies for a linear layer (cuBLAS, or csrc/cuda/gemm.cu) and
between them csrc/cuda/cross_entropy.cu, whose gradient takes the logits' place.

flops    6 tokens d classes, where forward and backward that form the logits twice have 8
bytes    beside the products' operands and results 6 a logit, and 8 an element of a weight's float32 gradient for each
         block of tokens but the first
memory   2 a logit of a block
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.backends.buffers import empty_gradients
from llmengine.backends.cuda.cross_entropy import class_weights
from llmengine.backends.cuda.native import Native, parameter, parts_of, unit_last_stride


def loss_with_gradients(
    native: Native, input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss,
    softcap, block_tokens, wanted,
):  # fmt: skip
    tokens, classes, wide = input.shape[0], linear_weight.shape[0], torch.float32
    x: Tensor = rows_of(input)
    head: Tensor = rows_of(linear_weight.to(input.dtype))
    core = native.core_of("linear", x, head, backward=True)
    labels, options = target.contiguous(), {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    options |= {"z_loss": z_loss, "softcap": softcap, **class_weights(weight, label_smoothing)}
    kinds = ((x.shape, x.dtype), (linear_weight.shape, linear_weight.dtype), ((classes,), wide))
    gradients = grad_input, grad_weight, grad_bias = empty_gradients(x, kinds, wanted, {})
    losses, lse = x.new_empty(tokens, dtype=wide), x.new_empty(tokens, dtype=wide)
    one, divisor = losses.new_ones(()), divisor_of(labels, weight, classes, ignore_index)
    scale = torch.where(divisor == 0, 0.0, 1.0 / divisor).to(wide) if reduction == "mean" else one
    # rows of whole vectors, which TMA fetches
    room = x.new_empty(min(block_tokens, tokens), -(-classes // 8) * 8)[:, :classes]

    def multiply(a, b, out, bias=None, *, add=False):
        if core is not None:
            native.call(
                "gemm", x, a=a, b=b, a2=None, b2=None, bias=bias, added=out if add else None, out=out,
                **native.products(x, core),
            )  # fmt: skip
        elif out.dtype == wide:
            native.weight_gradient(a.T, b, wide, out if add else out.zero_())
        elif bias is None:
            torch.mm(a, b, out=out)
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
            "cross_entropy_backward", x, grad_loss=scale, input=logits, **of_rows, reduction="sum", normaliser=one,
            grad_input=logits,
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
    loss = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        loss = torch.where(divisor == 0, 0.0, loss / divisor)
    return loss.to(wide), *gradients


def rows_of(matrix: Tensor) -> Tensor:
    rows = unit_last_stride(matrix)
    assert rows is not None
    return rows


def divisor_of(labels, weight, classes, ignore_index):
    """What a mean is divided by, in float64."""
    labelled = labels != ignore_index
    if weight is None:
        return labelled.sum(dtype=torch.float64)
    return torch.where(labelled, weight[labels.clamp(0, classes - 1)], 0.0).sum(dtype=torch.float64)
