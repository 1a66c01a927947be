"""Rotary position embedding (csrc/ops/rotary.h).

A program owns ROWS heads of tokens, all of their features: 2 elements moved per element of the input, beside cosines
and sines that the heads of a token share in the cache. Interleaved pairs are loaded as they lie and split in registers.
Limit: the memory's bandwidth. The backward is the same kernel with the sign of the angles turned.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import refuses_tensors, unit_last_stride
from llmengine.backends.triton.rows import power_of_2
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

TILE = 4096  # elements of a program, 32 to a thread
WIDEST = 8192  # head dim


@triton.jit
def _turn(
    input, cos, sin, output, rows, tokens, heads, batch_stride, token_stride, head_stride, pairs, head_dim,
    sign: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    token, head = row // heads, row % heads
    source = input + token // tokens * batch_stride + token % tokens * token_stride + head * head_stride
    target = output + row * head_dim
    if PAIRS:
        pair = tl.arange(0, PAIRS)[None, :]
        inside = (row < rows) & (pair < pairs)
        angle = token % tokens * pairs + pair
        c, s = tl.load(cos + angle, inside, 0.0), tl.load(sin + angle, inside, 0.0) * sign
        if INTERLEAVED:
            feature = tl.arange(0, 2 * PAIRS)[None, :]
            both = (row < rows) & (feature < 2 * pairs)
            x = tl.load(source + feature, both, 0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
            y = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * PAIRS))
            tl.store(target + feature, y.to(output.dtype.element_ty), both)
        else:
            a = tl.load(source + pair, inside, 0.0).to(tl.float32)
            b = tl.load(source + pairs + pair, inside, 0.0).to(tl.float32)
            tl.store(target + pair, (a * c - b * s).to(output.dtype.element_ty), inside)
            tl.store(target + pairs + pair, (b * c + a * s).to(output.dtype.element_ty), inside)
    if REST:
        feature = 2 * pairs + tl.arange(0, REST)[None, :]
        beyond = (row < rows) & (feature < head_dim)
        tl.store(target + feature, tl.load(source + feature, beyond), beyond)


def _refuses(x, cos, sin, interleaved):
    if x.shape[3] > WIDEST:
        return f"the triton backend takes head dims up to {WIDEST}, got {x.shape[3]}"
    return refuses_tensors(x, cos, sin)


def _run(x, cos, sin, interleaved, sign):
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, tokens, heads, head_dim = x.shape
    if not output.numel():
        return output
    source, rows, pairs = unit_last_stride(x), batch * tokens * heads, cos.shape[1]
    block, rest = power_of_2(pairs) if pairs else 0, head_dim - 2 * pairs
    per_program = max(TILE // power_of_2(head_dim), 1)
    _turn[(-(-rows // per_program),)](
        source, cos.contiguous(), sin.contiguous(), output, rows, tokens, heads, *source.stride()[:3], pairs, head_dim,
        sign, interleaved, per_program, block, power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip
    return output


@kernel(KERNELS, "rotary_forward", _refuses)
def rotary_forward(input, cos, sin, interleaved):
    return _run(input, cos, sin, interleaved, 1.0)


@kernel(KERNELS, "rotary_backward", _refuses)
def rotary_backward(grad_output, cos, sin, interleaved):
    return _run(grad_output, cos, sin, interleaved, -1.0)


def aot_calls(dtype: torch.dtype):
    """Both kinds of pairs, whole heads and a part of them (aot.py)."""

    def call(head_dim, turned, interleaved):
        qkv = torch.empty(2, 1024, 3, 16, head_dim, dtype=dtype, device="meta")
        table = torch.empty(1024, turned // 2, dtype=torch.float32, device="meta")
        rotary_backward(rotary_forward(qkv[:, :, 0], table, table, interleaved), table, table, interleaved)

    for head_dim, turned, interleaved in ((128, 128, False), (64, 64, True), (80, 32, False), (8192, 8192, True)):
        yield f"{turned} of {head_dim}", functools.partial(call, head_dim, turned, interleaved)
