"""A linear-chain conditional random field (csrc/ops/chain_field.h).

A program owns a sequence and walks it step by step. The K x K exponentials of the transitions stay in registers, K the
number of tags rounded up to a power of two: a step is a product with them, and K exponentials and logarithms. Where
that product is too small to be exact in float32, the step is done again with K x K exponentials (as in
csrc/cpu/chain_moves.h). Limit: the chain of steps, each a reduction over the program's threads with 16 or 32
multiplications in each.

Backward: programs stay and take several sequences, with the sum of grad_transition in registers; the sums of the
programs are then added in order. Decoding leaves, for each token and tag, the best tag before it; a second kernel
follows these from the last tokens, a sequence to each thread.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.device import multiprocessors, refuses_tensors, unit_last_stride
from llmengine.backends.triton.rows import power_of_2
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

MOST_TAGS = 128  # 32 transitions to each of 512 threads
SMALLEST_SUM = tl.constexpr(2.0**-80)  # below it, what exponentials lost by underflow may show
MOST_WARPS = 16
FORWARD_EACH = 32  # of the K x K numbers, those of a lane of 32; the backward holds two or three such matrices
# In how many programs the backward sums grad_transition, each its rows, where registers do not suffice for all of it.
PARTS = {32: 2, 128: 4}
RESIDENT_WARPS = 16  # of a multiprocessor, in the backward
TRACED = 32  # sequences of a program that follows pointers


@triton.jit
def _shift(x, axis: tl.constexpr):
    """What to take off before exponentials: the largest, or 0 where all are -inf."""
    largest = tl.max(x, axis)
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _log_sum_exp(x):
    shift = _shift(x, 0)
    return shift + tl.log(tl.sum(tl.exp(x - shift), 0))


@triton.jit
def _tags(K: tl.constexpr, count, on):
    """The mask of `count` tags where `on`, and of none elsewhere. (A number that is spread over a block by & is no
    bool to the interpreter of Triton 3.9.)"""
    return tl.arange(0, K) < tl.where(on, count, 0)


@triton.jit
def _load_moves(transition, K: tl.constexpr):
    return tl.load(transition + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :])


@triton.jit
def _log_sums(x, sums, transition, count, largest, FORWARD: tl.constexpr, K: tl.constexpr):
    """log sum exp(x + transition) - largest over the tags before (FORWARD) or behind; `sums` is nearly exp of it."""
    logs = tl.log(tl.where(sums < SMALLEST_SUM, 1.0, sums))
    inside = tl.arange(0, K) < count
    if tl.min(tl.where(inside, sums, 1.0), 0) < SMALLEST_SUM:
        logs = tl.where(sums < SMALLEST_SUM, _log_sums_exactly(x, transition, largest, FORWARD, K), logs)
    return logs


@triton.jit
def _log_sums_exactly(x, transition, largest, FORWARD: tl.constexpr, K: tl.constexpr):
    axis: tl.constexpr = 0 if FORWARD else 1
    both = _load_moves(transition, K) + tl.expand_dims(x, 1 - axis)
    shift = _shift(both, axis)
    return shift + tl.log(tl.sum(tl.exp(both - tl.expand_dims(shift, axis)), axis)) - largest


@triton.jit
def _forward(
    emissions, tags, transition, start, end, boundaries, losses, alpha, count, row_stride, K: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0)
    first, last = tl.load(boundaries + sequence).to(tl.int64), tl.load(boundaries + sequence + 1).to(tl.int64)
    j = tl.arange(0, K)
    inside = _tags(K, count, first < last)
    moves = _load_moves(transition, K)
    largest = _shift(tl.reshape(moves, (K * K,)), 0)
    odds = tl.exp(moves - largest)

    line = tl.load(start + j, inside, -float("inf"))
    tag = tl.load(tags + first, first < last, 0)
    right = tl.load(start + tag, (tag >= 0) & (tag < count), float("nan"))
    possible = right != -float("inf")
    # in double: of steps that cancel in part, up to thousands are added
    loss = -tl.where(possible, right, 0.0).to(tl.float64)
    x = tl.load(emissions + first * row_stride + j, inside, -float("inf")).to(tl.float32)
    for t in range(first, last):
        following = tl.load(emissions + (t + 1) * row_stride + j, _tags(K, count, t + 1 < last), -float("inf"))
        if t > first:
            sums = tl.sum(tl.exp(line)[:, None] * odds, 0)
            line = _log_sums(line, sums, transition, count, largest, True, K)
            before, tag = tag, tl.load(tags + t)
            known = (before >= 0) & (before < count) & (tag >= 0) & (tag < count)
            right = tl.load(transition + before * K + tag, known, float("nan"))
            loss += largest.to(tl.float64) - tl.where(right == -float("inf"), 0.0, right)
            possible &= right != -float("inf")
        line += x
        shift = _shift(line, 0)
        line -= shift
        known = (tag >= 0) & (tag < count)
        right = tl.load(emissions + t * row_stride + tag, known, float("nan")).to(tl.float32)
        loss += shift.to(tl.float64) - tl.where(right == -float("inf"), 0.0, right)
        possible &= right != -float("inf")
        tl.store(alpha + t * count + j, line, inside)
        x = following.to(tl.float32)
    right = tl.load(end + tag, (tag >= 0) & (tag < count), float("nan"))
    possible &= right != -float("inf")
    loss += _log_sum_exp(line + tl.load(end + j, inside, -float("inf"))).to(tl.float64)
    loss -= tl.where(right == -float("inf"), 0.0, right)
    loss = tl.where(possible | (loss != loss), loss, float("inf"))
    tl.store(losses + sequence, tl.where(first < last, loss, 0.0).to(tl.float32))


@triton.jit
def _marginal(x):
    """softmax(x), 0 where all are -inf, and what was taken off: log sum exp(x), or 0."""
    whole = _log_sum_exp(x)
    whole = tl.where(whole == -float("inf"), 0.0, whole)
    return tl.exp(x - whole), whole


@triton.jit
def _pairs(transition, i, before, whole, behind, K: tl.constexpr):
    """exp(before + transition + behind - whole) of the tags i and all tags behind them."""
    moves = tl.load(transition + i[:, None] * K + tl.arange(0, K)[None, :])
    return tl.exp(moves + (before - whole)[:, None] + behind[None, :])


@triton.jit
def _backward(
    grad_losses, emissions, tags, transition, start, end, boundaries, alpha, grad_emissions, grad_edges, partial_sums,
    sequences, count, row_stride, grad_stride, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # The tags whose transitions this program sums. Where they are not all of them, registers suffice for no more: the
    # exponentials of the transitions are then made anew at every step, which is exact without a second way.
    i, j = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
    inside = j < count
    largest = 0.0
    if ROWS == K:
        moves = _load_moves(transition, K)
        largest = _shift(tl.reshape(moves, (K * K,)), 0)
        odds = tl.exp(moves - largest)
    pairs = tl.zeros((ROWS, K), tl.float32)
    for sequence in range(tl.program_id(0), sequences, tl.num_programs(0)):
        first, last = tl.load(boundaries + sequence).to(tl.int64), tl.load(boundaries + sequence + 1).to(tl.int64)
        upstream = tl.load(grad_losses + tl.cast(sequence, tl.int64) * grad_stride)
        # of the token in hand: B, and what the forward saved
        line = tl.load(end + j, inside, -float("inf"))
        seen = tl.load(alpha + (last - 1) * count + j, _tags(K, count, first < last), -float("inf"))
        marginal, _ = _marginal(line + seen)
        tag = tl.load(tags + last - 1, first < last, 0)
        for step in range(0, last - first):
            t = last - 1 - step
            grad = upstream * (marginal - tl.where(j == tag, 1.0, 0.0))
            grad = tl.where((tag >= 0) & (tag < count), grad, float("nan"))
            writer = tl.program_id(1) == 0
            tl.store(grad_emissions + t * count + j, grad.to(grad_emissions.dtype.element_ty), _tags(K, count, writer))
            edges = grad_edges + tl.cast(sequence, tl.int64) * 2 * count + j
            tl.store(edges, grad, _tags(K, count, writer & (t == first)))
            tl.store(edges + count, grad, _tags(K, count, writer & (step == 0)))
            if t > first:
                before = tl.load(tags + t - 1)
                seen = tl.load(alpha + (t - 1) * count + j, inside, -float("inf"))
                line += tl.load(emissions + t * row_stride + j, inside, -float("inf")).to(tl.float32)
                line -= _shift(line, 0)
                behind = line
                if ROWS == K:
                    weighted = odds * tl.exp(behind)[None, :]
                    sums = tl.sum(weighted, 1)
                    line = _log_sums(behind, sums, transition, count, largest, False, K)
                    weights = tl.exp(seen)
                    marginal = weights * sums
                    total = tl.sum(marginal, 0)
                    if total >= SMALLEST_SUM:
                        marginal = marginal / total
                        pairs += (weights * (upstream / total))[:, None] * weighted
                    else:
                        marginal, whole = _marginal(seen + line)
                        pairs += upstream * _pairs(transition, i, seen, whole + largest, behind, K)
                else:
                    line = _log_sums_exactly(behind, transition, largest, False, K)
                    marginal, whole = _marginal(seen + line)
                    mine = tl.load(alpha + (t - 1) * count + i, i < count, -float("inf"))
                    pairs += upstream * _pairs(transition, i, mine, whole, behind, K)
                pairs -= tl.where((i == before)[:, None] & (j == tag)[None, :], upstream, 0.0)
                tag = before
    mine = partial_sums + tl.program_id(0).to(tl.int64) * K * K
    tl.store(mine + i[:, None] * K + j[None, :], pairs)


@triton.jit
def _walk(
    emissions, transition, start, end, boundaries, pointers, tags, scores, count, row_stride, K: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0)
    first, last = tl.load(boundaries + sequence).to(tl.int64), tl.load(boundaries + sequence + 1).to(tl.int64)
    j = tl.arange(0, K)
    inside = _tags(K, count, first < last)
    moves = _load_moves(transition, K)
    best, ends = tl.load(start + j, inside, -float("inf")), tl.load(end + j, inside, -float("inf"))
    wrong = (best < float("inf")) & (ends < float("inf"))
    wrong = tl.max((~wrong).to(tl.int32), 0)
    if first + 1 < last:
        wrong = tl.maximum(wrong, tl.max(tl.reshape((~(moves < float("inf"))).to(tl.int32), (K * K,)), 0))
    x = tl.load(emissions + first * row_stride + j, inside, -float("inf")).to(tl.float32)
    for t in range(first, last):
        following = tl.load(emissions + (t + 1) * row_stride + j, _tags(K, count, t + 1 < last), -float("inf"))
        if t > first:
            best, who = tl.max(best[:, None] + moves, 0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(pointers + t * count + j, who.to(tl.int8), inside)
        wrong = tl.maximum(wrong, tl.max((~(x < float("inf"))).to(tl.int32), 0))
        best += x
        x = following.to(tl.float32)
    score, tag = tl.max(best + ends, 0, return_indices=True, return_indices_tie_break_left=True)
    score = tl.where(wrong > 0, float("nan"), score)
    found = tl.abs(score) < float("inf")
    tl.store(tags + last - 1, tl.where(found, tag, -1).to(tl.int64), first < last)
    tl.store(scores + sequence, tl.where(first < last, score, 0.0))


@triton.jit
def _follow(boundaries, pointers, tags, sequences, count, BLOCK: tl.constexpr):
    """From the tag of each sequence's last token back to its first."""
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(boundaries + sequence, sequence < sequences, 0).to(tl.int64)
    t = tl.load(boundaries + sequence + 1, sequence < sequences, 0).to(tl.int64) - 1
    longest = tl.max(t + 1 - first, 0)
    tag = tl.load(tags + t, t >= first, -1)
    for _ in range(1, longest):
        on = (t > first) & (tag >= 0)
        tag = tl.load(pointers + t * count + tag, on, -1).to(tl.int64)
        t -= 1
        tl.store(tags + t, tag, on)


def _refuses(*tensors):
    emissions = next(t for t in tensors if t.ndim == 2)
    if emissions.shape[1] > MOST_TAGS:
        return f"the triton backend takes up to {MOST_TAGS} tags, got {emissions.shape[1]}"
    return refuses_tensors(*tensors)


def _tile(count: int, each: int) -> dict[str, int]:
    """`each`: as FORWARD_EACH."""
    k = max(power_of_2(count), 2)
    return {"K": k, "num_warps": min(max(k * k // (32 * each), 1), MOST_WARPS)}


def _contiguous(*tensors):
    return tuple(t.contiguous() for t in tensors)


def _square(transition, k: int):
    """(k, k), with -inf in the padding: without masks, whose addresses would take more registers than the numbers."""
    count = transition.shape[0]
    return torch.nn.functional.pad(transition, (0, k - count, 0, k - count), value=-torch.inf).contiguous()


@kernel(KERNELS, "chain_field_forward", _refuses)
def chain_field_forward(emissions, tags, transition, start, end, cu_seqlens):
    sequences, count = cu_seqlens.shape[0] - 1, emissions.shape[1]
    losses = transition.new_empty(sequences)
    alpha = transition.new_empty(emissions.shape)
    if sequences:
        x, tile = unit_last_stride(emissions), _tile(count, FORWARD_EACH)
        given = _contiguous(tags, _square(transition, tile["K"]), start, end, cu_seqlens)
        _forward[(sequences,)](x, *given, losses, alpha, count, x.stride(0), **tile)
    return losses, alpha


@kernel(KERNELS, "chain_field_backward", _refuses)
def chain_field_backward(grad_losses, emissions, tags, transition, start, end, cu_seqlens, alpha):
    sequences, count = cu_seqlens.shape[0] - 1, emissions.shape[1]
    grad_emissions = torch.zeros_like(emissions, memory_format=torch.contiguous_format)
    tile = _tile(count, 8 if count <= 32 else 16)
    k = tile["K"]
    programs = min(sequences, multiprocessors(emissions.device) * max(RESIDENT_WARPS // tile["num_warps"], 1))
    partial_sums = transition.new_empty(programs, k, k)
    grad_edges = transition.new_zeros(sequences, 2, count)  # of first and last tokens
    if sequences:
        x = unit_last_stride(emissions)
        given = _contiguous(tags, _square(transition, k), start, end, cu_seqlens, alpha)
        parts = PARTS.get(k, 1)
        _backward[(programs, parts)](
            grad_losses, x, *given, grad_emissions, grad_edges, partial_sums, sequences, count, x.stride(0),
            grad_losses.stride(0), k // parts, **tile,
        )  # fmt: skip
    grad_transition = partial_sums.sum(0)[:count, :count].contiguous()
    return grad_emissions, grad_transition, grad_edges[:, 0].sum(0), grad_edges[:, 1].sum(0)


@kernel(KERNELS, "chain_field_decode", _refuses)
def chain_field_decode(emissions, transition, start, end, cu_seqlens):
    sequences, count = cu_seqlens.shape[0] - 1, emissions.shape[1]
    tags = torch.full(emissions.shape[:1], -1, dtype=torch.int64, device=emissions.device)
    scores = transition.new_empty(sequences)
    if sequences:
        x, boundaries = unit_last_stride(emissions), cu_seqlens.contiguous()
        pointers = torch.empty(emissions.shape, dtype=torch.int8, device=emissions.device)
        tile = _tile(count, FORWARD_EACH)
        given = _contiguous(_square(transition, tile["K"]), start, end)
        _walk[(sequences,)](x, *given, boundaries, pointers, tags, scores, count, x.stride(0), **tile)
        _follow[(triton.cdiv(sequences, TRACED),)](boundaries, pointers, tags, sequences, count, TRACED, num_warps=1)
    return tags, scores


def aot_calls(dtype: torch.dtype):
    """Every class of tile, whole and padded (aot.py)."""

    def call(count):
        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        emissions, tags = empty(8192, count, dtype=dtype), empty(8192, dtype=torch.int64)
        field = empty(count, count), empty(count), empty(count), empty(65, dtype=torch.int32)
        losses, alpha = chain_field_forward(emissions, tags, *field)
        chain_field_backward(losses, emissions, tags, *field, alpha)
        chain_field_decode(emissions, *field)

    for count in (128, 100, 64, 45, 32, 16, 9, 2):
        yield f"{count} tags", functools.partial(call, count)
