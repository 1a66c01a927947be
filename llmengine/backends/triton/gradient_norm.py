"""The norm of a list of tensors (csrc/ops/gradient_norm.h), in two launches.

A program adds up the squares of BLOCK elements of one tensor (tensor_list.py); one program then adds those sums, in
float64 and in a fixed order. Bytes: one read of the tensors; the limit is the memory's bandwidth.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import refuses_tensors
from llmengine.backends.triton.rows import power_of_2
from llmengine.backends.triton.tensor_list import BLOCK, DTYPES, blocks, find, is_aligned, table_of, tensor_at
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

SUMS = 4096  # that the second pass adds at a time


@triton.jit
def _squares(table, count, sums, BLOCK: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    program = tl.program_id(0)
    row = find(table, count, program, COUNT)
    at = (program - tl.load(row)) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(row + count)
    inside = at < (tl.multiple_of(size, 16) if ALIGNED else size)
    x = tl.load(tensor_at(row + 2 * count, DTYPE, ALIGNED) + at, inside, 0.0).to(tl.float64)
    tl.store(sums + program, tl.sum(x * x, 0))


@triton.jit
def _root(sums, count, norm, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(sums + place, place < count, 0.0)
    tl.store(norm, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


def _refuses(gradients):
    return refuses_tensors(gradients[0]) if gradients else "no gradients, no device"


@kernel(KERNELS, "gradient_norm", _refuses)
def gradient_norm(gradients):
    device, packed = gradients[0].device, [g.contiguous() for g in gradients]
    entries = [(g.numel(), g.data_ptr()) for g in packed if g.numel()]
    sums = torch.empty(sum(map(blocks, entries)), dtype=torch.float64, device=device)
    norm, first = torch.empty((), dtype=torch.float32, device=device), 0
    for aligned in (True, False):
        chosen = tuple(entry for entry in entries if is_aligned(*entry) == aligned)
        if chosen:
            programs = sum(map(blocks, chosen))
            _squares[(programs,)](
                table_of(chosen, device), len(chosen), sums[first:], BLOCK=BLOCK, COUNT=power_of_2(len(chosen)),
                DTYPE=DTYPES[packed[0].dtype], ALIGNED=aligned, num_warps=8,
            )  # fmt: skip
            first += programs
    _root[(1,)](sums, len(sums), norm, SUMS, num_warps=8)
    return norm


def aot_calls(dtype: torch.dtype):
    """Of tensors that vectors fit, and of others."""

    def call():
        gradient_norm([torch.empty(shape, dtype=dtype, device="meta") for shape in ((50257, 768), (768,), (3, 5))])

    yield "a model's", functools.partial(call)
