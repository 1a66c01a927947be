"""Cross-entropy of rows of logits (csrc/ops/cross_entropy.h).

Forward: a program owns ROWS rows and sweeps over their classes once, in tiles, with a running maximum and a running sum
that is rescaled when the maximum grows (Milakov & Gimelshein 2018); rows without a label are not read. The losses are
then added up by one program in a fixed order. Bytes: one read of the logits.

Backward: the gradient of a tile needs nothing from other tiles once the log-sum-exp is known, so a program owns a tile.
Bytes: one read of the logits, one write of their gradient.

Both aim at the memory's bandwidth.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import refuses_tensors, unit_last_stride
from llmengine.backends.triton.maths import softcapped
from llmengine.backends.triton.rows import row_tiles
from llmengine.backends.triton.token_loss import (
    class_weights,
    gradient_factors,
    logits_gradient,
    reduce_losses,
    smoothing_shares,
    token_loss,
)
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

# Columns of a tile: no tile needs its whole row.
WIDEST = 4096


@triton.jit
def _forward(
    input, target, weight, weight_sum, losses, lse, rows, classes, input_stride, ignore_index, kept, share, z_loss,
    softcap, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label = tl.load(target + row, row < rows, ignore_index)
    labelled = (row < rows) & (label != ignore_index)
    source = input + row[:, None] * input_stride
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.max(labelled.to(tl.int32), 0) * classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = labelled[:, None] & (column < classes)[None, :]
        z = tl.load(source + column[None, :], inside, -float("inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(inside, softcapped(z, softcap), -float("inf"))
        larger = tl.maximum(largest, tl.max(z, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        largest = larger
        if SMOOTHED:
            if weight is not None:
                z *= tl.load(weight + column, column < classes, 0.0)[None, :]
            weighted += tl.sum(tl.where(inside, z, 0.0), 1)
    known = labelled & (label >= 0) & (label < classes)
    target_logit = tl.load(input + row * input_stride + label, known, 0.0).to(tl.float32)
    if CAPPED:
        target_logit = softcapped(target_logit, softcap)
    loss, log_sum = token_loss(
        tl.where(largest == -float("inf"), 0.0, largest), total, target_logit, weighted if SMOOTHED else None, label,
        weight, weight_sum, classes, kept, share, z_loss, labelled,
    )  # fmt: skip
    tl.store(losses + row, tl.where(labelled, loss, 0.0), row < rows)
    tl.store(lse + row, tl.where(labelled, log_sum, 0.0), row < rows)


@triton.jit
def _backward(
    grad_loss, input, target, weight, weight_sum, lse, normaliser, grad_input, rows, classes, grad_loss_stride,
    input_stride, ignore_index, kept, share, z_loss, softcap,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(target + row, row < rows, ignore_index)
    labelled = (row < rows) & (label != ignore_index)
    inside = labelled[:, None] & (column < classes)[None, :]
    log_sum = tl.load(lse + row, row < rows, 0.0)
    upstream = tl.load(grad_loss + row * grad_loss_stride, row < rows, 0.0)
    probability, smoothing, picked = gradient_factors(
        upstream, normaliser, label, weight, weight_sum, log_sum, classes, kept, share, z_loss, labelled, labelled
    )
    z = tl.load(input + row[:, None] * input_stride + column[None, :], inside, 0.0).to(tl.float32)
    if CAPPED:
        z = softcapped(z, softcap)
    grad = logits_gradient(
        z, column, classes, label, log_sum, probability, smoothing, picked, weight, softcap, SMOOTHED, CAPPED
    )
    grad = tl.where(labelled[:, None], grad, 0.0)
    place = grad_input + row[:, None] * classes + column[None, :]
    tl.store(place, grad.to(grad_input.dtype.element_ty), (row < rows)[:, None] & (column < classes)[None, :])


def _forward_refuses(input, target, weight, *_):
    return refuses_tensors(input, target, weight)


@kernel(KERNELS, "cross_entropy_forward", _forward_refuses)
def cross_entropy_forward(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap):
    rows, classes = input.shape
    losses = input.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(losses)
    logits, labels = unit_last_stride(input), target.contiguous()
    weight, weight_sum = class_weights(weight, label_smoothing)
    if rows:
        grid, tile = row_tiles("loss forward", logits, rows, classes, WIDEST)
        tile.pop("ONE")
        _forward[grid](
            logits, labels, weight, weight_sum, losses, lse, rows, classes, logits.stride(0), ignore_index,
            *smoothing_shares(label_smoothing, classes), z_loss, softcap, label_smoothing > 0, softcap > 0, **tile,
        )  # fmt: skip
    loss, normaliser = reduce_losses(losses, labels, weight, classes, reduction, ignore_index)
    return loss, lse, normaliser


def _backward_refuses(grad_loss, input, target, weight, *_):
    return refuses_tensors(grad_loss, input, target, weight)


@kernel(KERNELS, "cross_entropy_backward", _backward_refuses)
def cross_entropy_backward(
    grad_loss, input, target, weight, lse, normaliser, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    rows, classes = input.shape
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
    if grad_input.numel():
        logits = unit_last_stride(input)
        weight, weight_sum = class_weights(weight, label_smoothing)
        (programs,), tile = row_tiles("loss backward", logits, rows, classes, WIDEST)
        tile.pop("ONE")
        _backward[(programs, triton.cdiv(classes, tile["BLOCK"]))](
            grad_loss, logits, target.contiguous(), weight, weight_sum, lse, normaliser, grad_input, rows, classes,
            grad_loss.stride(0) if grad_loss.ndim else 0, logits.stride(0), ignore_index,
            *smoothing_shares(label_smoothing, classes), z_loss, softcap, label_smoothing > 0, softcap > 0, **tile,
        )  # fmt: skip
    return grad_input


def aot_calls(dtype: torch.dtype):
    """With every option and with none, wide, narrow and unaligned rows (aot.py)."""

    def call(rows, classes, options):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        logits, target = empty(rows, classes), empty(rows, dtype=torch.int64)
        weight = empty(classes, dtype=torch.float32) if options else None
        options = ("mean", -100, 0.1, 1e-4, 30.0) if options else ("sum", -100, 0.0, 0.0, 0.0)
        loss, lse, normaliser = cross_entropy_forward(logits, target, weight, *options)
        cross_entropy_backward(loss, logits, target, weight, lse, normaliser, *options)

    for classes, options in [(131072, True), (131072, False), (50257, True), (1000, True), (2, False)]:
        yield f"{classes}" + " options" * options, functools.partial(call, 8192, classes, options)
