"""One step of AdamW over a list of parameters (csrc/ops/adamw.h), in one launch.

A program owns BLOCK elements of one parameter (tensor_list.py).
Limit: memory, 28 bytes an element in float32, 30 in bfloat16 with masters, 14 in bfloat16 alone.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from llmengine.backends.buffers import Packed
from llmengine.backends.triton.device import refuses_tensors
from llmengine.backends.triton.philox import random_words
from llmengine.backends.triton.rows import power_of_2
from llmengine.backends.triton.tensor_list import BLOCK, DTYPES, blocks, find, is_aligned, table_of, tensor_at
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@triton.jit(do_not_specialize=["seed"])
def _step(
    table, count, lr, multiplier, found_inf, log_beta1, log_beta2, beta1_rest, beta2, beta2_rest, eps, weight_decay,
    sign, seed, BLOCK: tl.constexpr, COUNT: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr, PEAK: tl.constexpr, MASTER: tl.constexpr, LR_IN_MEMORY: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = find(table, count, program, COUNT)
    at = (program - tl.load(row)) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(row + count)
    inside = at < (tl.multiple_of(size, 16) if ALIGNED else size)
    t = tl.load(tl.load(row + 3 * count).to(tl.pointer_type(tl.float32)))
    if found_inf is not None:
        inside = inside & (tl.load(found_inf) == 0.0)

    rate = tl.load(lr).to(tl.float32) if LR_IN_MEMORY else lr
    bias1 = (1.0 - tl.exp(t.to(tl.float64) * log_beta1)).to(tl.float32)
    bias2 = (1.0 - tl.exp(t.to(tl.float64) * log_beta2)).to(tl.float32)

    parameters = tensor_at(row + 4 * count, WEIGHT, ALIGNED) + at
    exp_avgs = tensor_at(row + 6 * count, MOMENT, ALIGNED) + at
    exp_avg_sqs = tensor_at(row + 7 * count, MOMENT, ALIGNED) + at
    g = tl.load(tensor_at(row + 5 * count, GRADIENT, ALIGNED) + at, inside, 0.0).to(tl.float32) * sign
    if multiplier is not None:
        g *= tl.load(multiplier)
    m = tl.load(exp_avgs, inside, 0.0).to(tl.float32)
    v = tl.load(exp_avg_sqs, inside, 0.0).to(tl.float32)
    # a + rest (b - a), from the nearer end
    m = tl.where(beta1_rest < 0.5, m + beta1_rest * (g - m), g - (1.0 - beta1_rest) * (g - m))
    v = beta2 * v + beta2_rest * g * g

    low, high, low_1, high_1 = 0, 0, 0, 0
    if STOCHASTIC:
        key0, key1 = seed.to(tl.int64).to(tl.uint32), (seed.to(tl.int64) >> 32).to(tl.uint32)
        rows = tl.zeros([1], tl.int64) + ((t.to(tl.int64) << 32) + tl.load(row + 2 * count))
        groups = ((program - tl.load(row)) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        low, high = _halves(random_words(key0, key1, 0, rows, groups), BLOCK)
        low_1, high_1 = _halves(random_words(key0, key1, 1, rows, groups), BLOCK)
    tl.store(exp_avgs, _rounded(m, high, MOMENT, STOCHASTIC), inside)
    tl.store(exp_avg_sqs, _rounded(v, low_1, MOMENT, STOCHASTIC), inside)
    if PEAK:
        peaks = tensor_at(row + 8 * count, MOMENT, ALIGNED) + at
        v = tl.maximum(tl.load(peaks, inside, 0.0).to(tl.float32), v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(peaks, _rounded(v, high_1, MOMENT, STOCHASTIC), inside)

    weights = tensor_at(row + 9 * count, tl.float32, ALIGNED) + at if MASTER else parameters
    w = tl.load(weights, inside, 0.0).to(tl.float32)
    w = w * (1.0 - rate * weight_decay) - (rate / bias1) * m / (tl.sqrt(v) / tl.sqrt(bias2) + eps)
    if MASTER:
        tl.store(weights, w, inside)
        tl.store(parameters, w.to(WEIGHT), inside)
    else:
        tl.store(parameters, _rounded(w, low, WEIGHT, STOCHASTIC), inside)


@triton.jit
def _halves(words, BLOCK: tl.constexpr):
    words = tl.reshape(words, [BLOCK])
    return words & 0xFFFF, words >> 16


@triton.jit
def _rounded(x, noise, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 in DTYPE: to nearest, or, of bfloat16 where STOCHASTIC, by chance."""
    if STOCHASTIC and DTYPE == tl.bfloat16:
        return stochastic_bits(x, noise).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def stochastic_bits(x, noise):
    """The bfloat16, as uint16, that the float's bits leave when the noise, 16 bits, has been added."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    special = tl.where(x == x, bits, 0x7FC00000)
    return (tl.where(finite, bits + noise, special) >> 16).to(tl.uint16)


def _refuses(parameters, gradients, exp_avgs, exp_avg_sqs, *_):
    return refuses_tensors(*(tensors[0] for tensors in (parameters, gradients, exp_avgs, exp_avg_sqs) if tensors))


@kernel(KERNELS, "adamw", _refuses)
def adamw(
    parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, numbers, lr, multiplier, found_inf,
    beta1, beta2, eps, weight_decay, maximize, stochastic, seed,
):  # fmt: skip
    torch._foreach_add_(steps, [1 if found_inf is None else 1 - found_inf.reshape(())] * len(steps))
    with Packed() as packed:
        lists = [steps, packed(parameters), [g.contiguous() for g in gradients], packed(exp_avgs), packed(exp_avg_sqs)]
        lists += [packed(given) if given else lists[-1] for given in (max_exp_avg_sqs, masters)]
        entries = [(p.numel(), number, *(tensors[i].data_ptr() for tensors in lists))
                   for i, (p, number) in enumerate(zip(parameters, numbers, strict=True)) if p.numel()]  # fmt: skip
        # one that begins or ends between 16 bytes would have all read their elements singly
        for aligned in (True, False):
            chosen = tuple(entry for entry in entries if is_aligned(entry[0], *entry[3:]) == aligned)
            if not chosen:
                continue
            _step[(sum(map(blocks, chosen)),)](
                table_of(chosen, parameters[0].device), len(chosen), float(lr) if lr.is_cpu else lr, multiplier,
                found_inf, _log(beta1), _log(beta2), 1 - beta1, beta2, 1 - beta2, eps, weight_decay,
                -1.0 if maximize else 1.0, seed, BLOCK=BLOCK,
                COUNT=power_of_2(len(chosen)), WEIGHT=DTYPES[parameters[0].dtype],
                GRADIENT=DTYPES[gradients[0].dtype], MOMENT=DTYPES[exp_avgs[0].dtype],
                PEAK=bool(max_exp_avg_sqs), MASTER=bool(masters), LR_IN_MEMORY=not lr.is_cpu, STOCHASTIC=stochastic,
                ALIGNED=aligned, num_warps=8,
            )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def aot_calls(dtype: torch.dtype):
    """Every way of keeping state."""

    def call(moments, masters, peaks, stochastic, gradients=dtype):
        def tensors(dtype):
            return [torch.empty(shape, dtype=dtype, device="meta") for shape in ((50257, 768), (768,), (3, 5))]

        scalar = torch.empty((), device="meta")
        adamw(
            tensors(dtype), tensors(gradients), tensors(moments), tensors(moments), tensors(moments) if peaks else [],
            tensors(torch.float32) if masters else [], [scalar] * 3, [0, 1, 2], torch.tensor(1e-3),
            scalar if masters else None, scalar if masters else None, 0.9, 0.999, 1e-8, 0.1, False, stochastic, 0,
        )  # fmt: skip

    half = dtype != torch.float32
    yield "plain", functools.partial(call, dtype, False, False, False)
    yield "masters, amsgrad", functools.partial(call, torch.float32, half, True, False)
    if half:
        yield "float32 gradients", functools.partial(call, torch.float32, True, False, False, torch.float32)
    if dtype == torch.bfloat16:
        yield "stochastic", functools.partial(call, dtype, False, True, True)
        yield "stochastic weights", functools.partial(call, torch.float32, False, False, True)
