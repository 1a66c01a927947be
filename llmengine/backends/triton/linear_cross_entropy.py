"""Cross-entropy of a linear layer's logits, which are never held whole (csrc/ops/linear_cross_entropy.h).

Forward: a program owns BLOCK_M tokens and a span of the classes. It forms the logits of BLOCK_N classes at a time in
registers, as a matrix product, and folds them into each token's running maximum and sum (and target logit, and weighted
sum for label smoothing). A second kernel merges the spans in a fixed order. 2 tokens classes d flops; memory: 16 bytes
a token and span.

Backward: classes are taken in chunks. For each, one kernel forms the logits again and from them their gradient, in the
input's dtype, in a buffer; two products turn it into the chunk's part of the input's gradient and the chunk's rows of
the weight's gradient. No atomics, equal bits at every run. 6 tokens classes d flops; memory: the buffer (CHUNK
elements, or LEAST classes where tokens are many) and, with several chunks, a byte for each element of a 16-bit input,
whose gradient's sums lie there and in the gradient until the last chunk (gemm.py, Between).

Of a shard of the classes PyTorch merges the spans, and a token's factors are given instead of made from its loss.

Tiles of tokens of which none has a label form no logits. With a gradient filter, tiles of the logits' gradient that
are nowhere beyond it become zeros, which the products leave out (block_sparse.py). The limit aimed at is the matrix
units' rate.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.buffers import empty_gradients
from llmengine.backends.triton.block_sparse import Kept, block_sparse_gemm
from llmengine.backends.triton.columns import column_sums
from llmengine.backends.triton.device import multiprocessors, precision, refuses_tensors, unit_last_stride
from llmengine.backends.triton.gemm import Between, accumulate, gemm, tile_place
from llmengine.backends.triton.maths import softcapped
from llmengine.backends.triton.tiles import Tile, pick
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

# Elements of the backward's buffer: 64 MiB of 16-bit gradients.
CHUNK = 2**25
# Classes of a chunk, at least. Each chunk reads and writes the sums of the input's gradient once more, 6 bytes an
# element: over this many classes that is a twentieth of the time of the products, at 3.35 TB/s and 700 TFLOP/s.
LEAST = 4096
# Programs of the forward on each multiprocessor, one after the other: more of them end at more nearly the same time.
WAVES = 4
# Tokens whose spans one program merges.
MERGED = 128


@triton.jit
def _forward(
    x, linear_weight, linear_bias, target, weight, partial, tokens, classes, d, x_m, weight_n, span, spans,
    ignore_index, softcap, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, part = tile_place(tokens, spans, BLOCK_M, 1, GROUP)
    m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    label = tl.load(target + m, m < tokens, ignore_index)
    anything = tl.max((label != ignore_index).to(tl.int32), 0)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    target_logit = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    first = part * span
    for start in range(first, first + anything * (tl.minimum(first + span, classes) - first), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        z = _logits(
            x, linear_weight, linear_bias, m, n, tokens, classes, d, x_m, weight_n, softcap,
            CAPPED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION,
        )  # fmt: skip
        inside = (n < classes)[None, :]
        target_logit += tl.sum(tl.where(n[None, :] == label[:, None], z, 0.0), 1)
        if SMOOTHED:
            if weight is not None:
                weighted += tl.sum(tl.where(inside, z * tl.load(weight + n, n < classes, 0.0)[None, :], 0.0), 1)
            else:
                weighted += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, -float("inf"))
        larger = tl.maximum(largest, tl.max(z, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        largest = larger
    mine = partial + part.to(tl.int64) * 4 * tokens + m
    tl.store(mine, largest, m < tokens)
    tl.store(mine + tokens, total, m < tokens)
    tl.store(mine + 2 * tokens, target_logit, m < tokens)
    tl.store(mine + 3 * tokens, weighted, m < tokens)


@triton.jit
def _logits(
    x, linear_weight, linear_bias, m, n, tokens, classes, d, x_m, weight_n, softcap,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits of tokens m and classes n after the softcap, over the first d columns of x."""
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    z = accumulate(
        z, x, linear_weight, m, n, tokens, classes, 0, d, x_m, 1, 1, weight_n, BLOCK_K, EVEN, PRECISION
    )  # fmt: skip
    if linear_bias is not None:
        z += tl.load(linear_bias + n, n < classes, 0.0).to(tl.float32)[None, :]
    if CAPPED:
        z = softcapped(z, softcap)
    return z


@triton.jit
def _merge(
    partial, target, weight, weight_sum, losses, lse, tokens, classes, spans, ignore_index, kept, share, z_loss,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = m < tokens
    label = tl.load(target + m, inside, ignore_index)
    labelled = inside & (label != ignore_index)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    target_logit = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    span = partial + m
    for _ in range(0, spans):
        its_largest = tl.load(span, inside, -float("inf"))
        larger = tl.maximum(largest, its_largest)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.load(span + tokens, inside, 0.0) * tl.exp(its_largest - shift)
        target_logit += tl.load(span + 2 * tokens, inside, 0.0)
        weighted += tl.load(span + 3 * tokens, inside, 0.0)
        largest = larger
        span += 4 * tokens
    loss, log_sum = token_loss(
        tl.where(largest == -float("inf"), 0.0, largest), total, target_logit, weighted if SMOOTHED else None, label,
        weight, weight_sum, classes, kept, share, z_loss, labelled,
    )  # fmt: skip
    tl.store(losses + m, tl.where(labelled, loss, 0.0), inside)
    tl.store(lse + m, tl.where(labelled, log_sum, 0.0), inside)


@triton.jit
def _grad_logits(
    grad_loss, x, linear_weight, linear_bias, target, weight, weight_sum, lse, normaliser, factors, grad, flags, tokens,
    first_class, chunk_end, classes, d, grad_loss_stride, x_m, weight_n, grad_m, ignore_index, kept, share, z_loss,
    softcap, gradient_filter, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_place(tokens, chunk_end - first_class, BLOCK_M, BLOCK_N, GROUP)
    m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    n = first_class + column + tl.arange(0, BLOCK_N).to(tl.int64)
    label = tl.load(target + m, m < tokens, ignore_index)
    labelled = (m < tokens) & (label != ignore_index)
    anything = tl.max(labelled.to(tl.int32), 0)
    z = _logits(
        x, linear_weight, linear_bias, m, n, tokens, classes, anything * d, x_m, weight_n, softcap,
        CAPPED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION,
    )  # fmt: skip
    log_sum = tl.load(lse + m, m < tokens, 0.0)
    if factors is not None:
        probability = tl.load(factors + m, m < tokens, 0.0)
        smoothing = tl.load(factors + tokens + m, m < tokens, 0.0)
        picked = tl.load(factors + 2 * tokens + m, m < tokens, 0.0)
    else:
        upstream = tl.load(grad_loss + m * grad_loss_stride, m < tokens, 0.0)
        probability, smoothing, picked = gradient_factors(
            upstream, normaliser, label, weight, weight_sum, log_sum, classes, kept, share, z_loss, labelled, labelled
        )
    dz = logits_gradient(
        z, n, classes, label, log_sum, probability, smoothing, picked, weight, softcap, SMOOTHED, CAPPED
    )
    dz = tl.where(labelled[:, None], dz, 0.0)
    if flags is not None:
        small = tl.abs(dz) <= gradient_filter * tl.abs(upstream / tl.load(normaliser))[:, None]
        small &= tl.abs(dz) < float("inf")  # an overflow is for the caller to see
        counts = labelled[:, None] & (n < chunk_end)[None, :] & ~small
        holds = tl.max(tl.max(counts.to(tl.int32), 1), 0)
        across = tl.cdiv(chunk_end - first_class, BLOCK_N)
        tl.store(flags + row // BLOCK_M * across + column // BLOCK_N, holds)
        dz = tl.where(holds != 0, dz, 0.0)
    place = grad + m[:, None] * grad_m + (n - first_class)[None, :]
    tl.store(place, dz.to(grad.dtype.element_ty), (m < tokens)[:, None] & (n < chunk_end)[None, :])


def _operands(input, linear_weight, linear_bias, target):
    x = unit_last_stride(input)
    bias = None if linear_bias is None else linear_bias.contiguous()
    return x, unit_last_stride(linear_weight.to(x.dtype)), bias, target.contiguous()


def _forward_refuses(input, linear_weight, linear_bias, target, weight, *_):
    return refuses_tensors(input, linear_weight, linear_bias, target, weight)


@kernel(KERNELS, "linear_cross_entropy_forward", _forward_refuses)
def linear_cross_entropy_forward(
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
):
    tokens, classes = input.shape[0], linear_weight.shape[0]
    labels = target.contiguous()
    weight, weight_sum = class_weights(weight, label_smoothing)
    losses = input.new_empty(tokens, dtype=torch.float32)
    lse = torch.empty_like(losses)
    if tokens:
        partial = _spans(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap)
        _merge[(-(-tokens // MERGED),)](
            partial, labels, weight, weight_sum, losses, lse, tokens, classes, len(partial), ignore_index,
            *smoothing_shares(label_smoothing, classes), z_loss, label_smoothing > 0, MERGED,
        )  # fmt: skip
    loss, normaliser = reduce_losses(losses, labels, weight, classes, reduction, ignore_index)
    return loss, lse, normaliser


def _spans(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap):
    """(spans, 4, tokens): the largest logit, the sum of exponentials below it, the target's logit, the weighted sum."""
    (tokens, d), classes = input.shape, linear_weight.shape[0]
    x, w, bias, labels = _operands(input, linear_weight, linear_bias, target)
    tile = pick("fused", x, w.T)
    rows, columns = -(-tokens // tile.m), -(-classes // tile.n)
    wanted = min(-(-WAVES * multiprocessors(x.device) // rows), columns)
    span = -(-columns // wanted) * tile.n
    spans = -(-classes // span)
    partial = x.new_empty(spans, 4, tokens, dtype=torch.float32)
    _forward[(rows * spans,)](
        x, w, bias, labels, weight, partial, tokens, classes, d, x.stride(0), w.stride(0), span, spans,
        ignore_index, softcap, label_smoothing > 0, softcap > 0, EVEN=d % tile.k == 0,
        PRECISION=precision(x.dtype, x.device), **tile.constants(),
    )  # fmt: skip
    return partial


@kernel(KERNELS, "linear_cross_entropy_shard_forward", _forward_refuses)
def linear_cross_entropy_shard_forward(
    input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap
):
    nothing = input.new_tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=torch.float32)[:, None]
    if not input.shape[0]:
        return nothing.expand(4, 0).contiguous()
    weight = None if weight is None else weight.float().contiguous()
    partial = _spans(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap)
    largest = partial[:, 0].amax(0)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    total = (partial[:, 1] * (partial[:, 0] - shift).exp()).sum(0)
    statistics = torch.stack([largest, total, partial[:, 2].sum(0), partial[:, 3].sum(0)])
    return torch.where(target != ignore_index, statistics, nothing)


def _backward_refuses(grad_loss, input, linear_weight, linear_bias, target, weight, *_):
    return refuses_tensors(grad_loss, input, linear_weight, linear_bias, target, weight)


@kernel(KERNELS, "linear_cross_entropy_backward", _backward_refuses)
def linear_cross_entropy_backward(
    grad_loss, input, linear_weight, linear_bias, target, weight, lse, normaliser, reduction, ignore_index,
    label_smoothing, z_loss, softcap, gradient_filter, main, wanted,
):  # fmt: skip
    tensors = (input, linear_weight, linear_bias, target, weight)
    of_loss, options = (grad_loss, normaliser, None), (ignore_index, label_smoothing, z_loss, softcap, gradient_filter)
    return _gradients(tensors, lse, of_loss, *options, main, wanted)


@kernel(KERNELS, "linear_cross_entropy_shard_backward", _forward_refuses)
def linear_cross_entropy_shard_backward(
    input, linear_weight, linear_bias, target, weight, lse, factors, ignore_index, label_smoothing, softcap, main,
    wanted,
):  # fmt: skip
    tensors = (input, linear_weight, linear_bias, target, weight)
    of_loss = (None, None, factors)
    return _gradients(tensors, lse, of_loss, ignore_index, label_smoothing, 0.0, softcap, 0.0, main, wanted)


def _gradients(tensors, lse, of_loss, ignore_index, label_smoothing, z_loss, softcap, gradient_filter, main, wanted):
    """of_loss: the loss's gradient and normaliser, or each token's factors."""
    input, linear_weight, linear_bias, target, weight = tensors
    grad_loss, normaliser, factors = of_loss
    (tokens, d), classes = input.shape, linear_weight.shape[0]
    x, w, bias, labels = _operands(input, linear_weight, linear_bias, target)
    weight, weight_sum = class_weights(weight, label_smoothing)
    chunk = min(max(CHUNK // max(tokens, 1), LEAST), classes + 255) // 256 * 256
    kinds = ((x.shape, x.dtype), (linear_weight.shape, linear_weight.dtype), ((classes,), torch.float32))
    grad_input, grad_weight, grad_bias = empty_gradients(x, kinds, wanted, {1: main})
    if not tokens:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    weight_sums = grad_weight if main is None else main
    buffer = x.new_empty(tokens, chunk)
    in_parts = wanted[0] and chunk < classes and x.dtype != torch.float32
    low = torch.empty_like(grad_input, dtype=torch.uint8) if in_parts else None
    tile = pick("fused", x, w[:chunk].T)
    for first in range(0, classes, chunk):
        last = min(first + chunk, classes)
        grad = buffer[:, : last - first]
        kept = _kept(grad, tile) if gradient_filter > 0 else None
        _grad_logits[(tile.programs(tokens, last - first),)](
            grad_loss, x, w, bias, labels, weight, weight_sum, lse, normaliser, factors, grad, kept and kept.flags,
            tokens, first, last, classes, d, grad_loss.stride(0) if grad_loss is not None and grad_loss.ndim else 0,
            x.stride(0), w.stride(0), grad.stride(0), ignore_index, *smoothing_shares(label_smoothing, classes), z_loss,
            softcap, gradient_filter, label_smoothing > 0, softcap > 0,
            EVEN=d % tile.k == 0, PRECISION=precision(x.dtype, x.device), **tile.constants(),
        )  # fmt: skip
        if wanted[0]:
            between = None if low is None else Between(low, last == classes)
            _product(grad, kept, w[first:last], grad_input, added=first > 0, between=between)
        if wanted[1]:
            _product(grad.T, kept and kept.T, x, weight_sums[first:last], added=main is not None)
        if wanted[2]:
            column_sums(grad, grad_bias[first:last])
    return grad_input, grad_weight, grad_bias


def _kept(grad, tile: Tile) -> Kept:
    """For the kernel to say which of its tiles hold anything."""
    down, across = -(-grad.shape[0] // tile.m), -(-grad.shape[1] // tile.n)
    return Kept(grad.new_empty(down, across, dtype=torch.int32), tile.m, tile.n)


def _product(a, kept: Kept | None, b, out, **sums):
    return gemm(a, b, out=out, **sums) if kept is None else block_sparse_gemm(a, kept, b, out=out, **sums)


def _with_gradients_refuses(*given):
    if given[-2]:
        return "gradients are made with the loss in the dtypes of what they belong to"
    return _forward_refuses(*given)


@kernel(KERNELS, "linear_cross_entropy_with_gradients", _with_gradients_refuses)
def linear_cross_entropy_with_gradients(input, linear_weight, linear_bias, target, weight, *options):
    """In two passes over the logits: `at_once` does not ask for it here."""
    *given, _block_tokens, _wide, wanted = options
    tensors = (input, linear_weight, linear_bias, target, weight)
    loss, lse, normaliser = linear_cross_entropy_forward(*tensors, *given)
    rest = (lse, normaliser, *given, 0.0, None, wanted)
    return loss, *linear_cross_entropy_backward(torch.ones_like(loss), *tensors, *rest)


def aot_calls(dtype: torch.dtype):
    """With every option and with none; many, few and unaligned (aot.py)."""

    def call(tokens, d, classes, options):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        x, w, target = empty(tokens, d), empty(classes, d), empty(tokens, dtype=torch.int64)
        bias, weight = (empty(classes), empty(classes, dtype=torch.float32)) if options else (None, None)
        gradient_filter = 2**-12 if options else 0.0
        options = ("mean", -100, 0.1, 1e-4, 30.0) if options else ("mean", -100, 0.0, 0.0, 0.0)
        loss, lse, normaliser = linear_cross_entropy_forward(x, w, bias, target, weight, *options)
        wanted = [True, True, bias is not None]
        given = (x, w, bias, target, weight, lse, normaliser, *options, gradient_filter)
        linear_cross_entropy_backward(loss, *given, None, wanted)
        main = empty(classes, d, dtype=torch.float32)
        shard = (-1, options[2], options[4], main, wanted)
        linear_cross_entropy_shard_backward(x, w, bias, target, weight, lse, lse.new_empty(3, tokens), *shard)

    for tokens, d, classes, options in [
        (8192, 4096, 128256, True), (65536, 768, 50304, False), (16, 4096, 128256, False), (300, 250, 5001, True),
    ]:  # fmt: skip
        kind = f"{tokens} x {d} x {classes}" + " options" * options
        yield kind, functools.partial(call, tokens, d, classes, options)
    if dtype == torch.float32:
        yield "TF32", functools.partial(call, 8192, 4096, 128256, True)
