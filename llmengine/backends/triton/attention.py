"""Attention in Triton: what is refused, and the launches of attention_forward.py and attention_backward.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.triton.attention_backward import keys_kernel, mask_kernel, rows_kernel, statistics_kernel
from llmengine.backends.triton.attention_distance import distance_kernel
from llmengine.backends.triton.attention_forward import forward_kernel
from llmengine.backends.triton.attention_table import DISTANCE, FORWARD, KEYS, MASK, ROWS, STATISTICS, Tile, tile_for
from llmengine.backends.triton.attention_tile import Distances, Mask, Options, Rows, Shape, Sizes
from llmengine.backends.triton.device import all_registers, dropped_below, precision, refuses_tensors, unit_last_stride
from llmengine.backends.triton.rows import power_of_2
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

WIDEST = 256  # the widest head that leaves registers and shared memory for tiles worth their name
MOST_TOKENS = 2**30  # positions, and windows beside them, are 32-bit numbers
LOG2E = math.log2(math.e)
TINY = 2.0**-126  # the least float whose products with others are not 0


def _refuses(query, key, value, mask, *options):
    if reason := refuses_tensors(query, key, value, mask):
        return reason
    if (widest := max(query.shape[3], value.shape[3])) > WIDEST:
        return f"the triton backend takes head dims up to {WIDEST}, got {widest}"
    if (tokens := max(query.shape[2], key.shape[2])) > MOST_TOKENS:
        return f"the triton backend takes up to {MOST_TOKENS} tokens, got {tokens}"
    return None


def _backward_refuses(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
    return refuses_tensors(grad_output, grad_lse, output, lse) or _refuses(query, key, value, *options)


class _DistanceSums(NamedTuple):
    """What is yet to be added up of the gradient of a bias by distance, in two parts each."""

    ends: Tensor  # of each row tile, by rows_kernel: (left or right end, sequences, heads, tiles)
    between: Tensor  # of each sequence, by distance_kernel: (upper or lower, sequences, heads, 2 M - 1)

    def total(self) -> Tensor:
        entries = self.between.sum((0, 1))
        left, right = self.ends.sum((1, 3))
        if entries.shape[1] == 0:  # M is 0: both ends are one
            return (left + right)[:, None]
        return torch.cat([left[:, None], entries, right[:, None]], 1)


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(
        self, query, key, value, mask, alibi_slopes, distance_bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, seed, window_left, window_right, bottom_right, scale, softcap, dropout_p,
    ):  # fmt: skip
        self.query, self.key, self.value = (unit_last_stride(x) for x in (query, key, value))
        self.packed = cu_seqlens_q is not None
        self.longest = (max_seqlen_q, max_seqlen_k) if self.packed else (query.shape[2], key.shape[2])
        self.sequences = cu_seqlens_q.shape[0] - 1 if self.packed else query.shape[0]
        self.farthest = 0 if distance_bias is None else distance_bias.shape[1] // 2
        biased = any(x is not None for x in (mask, alibi_slopes, distance_bias))
        self.fold = scale >= TINY and query.dtype != torch.float32 and not softcap and not biased
        # A bias by distance beside other work on the logits, or beside exact products, takes a wider head's registers,
        # and so does all that other work at once.
        others = mask is not None or alibi_slopes is not None or softcap > 0 or query.dtype == torch.float32
        every = mask is not None and alibi_slopes is not None and softcap > 0 and dropout_p > 0
        self.exact_bias = query.dtype == torch.float32 and mask is not None and mask.is_floating_point()
        self.crowded = every or (distance_bias is not None and others)
        # Rows whose addresses are no multiples of 16 are fetched in small pieces, through registers.
        self.ragged = bool(query.shape[3] % 16 or value.shape[3] % 16)
        self.options = Options(
            None if mask is None else _mask(mask),
            None if alibi_slopes is None else _rows(alibi_slopes[..., None, None]),
            None if distance_bias is None else Distances(distance_bias.contiguous(), self.farthest),
            None if sinks is None else sinks.contiguous(),
            cu_seqlens_q.contiguous() if self.packed else None,
            cu_seqlens_k.contiguous() if self.packed else None,
            seed if dropout_p else None,
            dropped_below(dropout_p),
            1 / (1 - dropout_p),
            _window(window_left),
            _window(window_right),
            int(bottom_right),
            scale,
            scale * LOG2E,
            softcap or None,
        )

    def run(self, kernel, kind: str, *operands, mask_sizes: tuple[int, ...] | None = None) -> None:
        """kernel[programs](*operands, sizes, options, shape): programs own tiles of rows, of the keys of key heads, of
        a mask that has `mask_sizes`, or diagonals of tiles."""
        heads, rows = self.query.shape[1:3]
        key_heads, keys = self.value.shape[1:3]
        shape, launch = self.shape(kind)
        longest, tile, owners = (self.longest[0], launch.rows, heads)
        if kind == KEYS:
            longest, tile, owners = self.longest[1], launch.keys, key_heads
        tiles = max(_ceil(longest, tile), int(self.packed))
        programs = tiles * owners * (self.sequences + int(self.packed))
        if kind == DISTANCE:
            tiles = _ceil(2 * self.farthest, launch.keys) + 2
            programs = tiles * heads * self.sequences
        if mask_sizes:
            batch, mask_heads, mask_rows = mask_sizes
            programs = batch * mask_heads * _ceil(mask_rows, launch.rows) * _ceil(keys, launch.keys)
        if programs:
            sizes = Sizes(tiles, heads, key_heads, self.sequences, rows, keys)
            registers = all_registers(self.query.device, launch.warps) if self.full(shape) else {}
            kernel[(programs,)](
                *operands, sizes, self.options, shape, num_warps=launch.warps, num_stages=launch.stages, **registers
            )

    def full(self, shape: Shape) -> bool:
        """Whether a program wants all registers that there are: TF32's fragments have 32 bits an element, tiles of two
        widths are those of the wider, and a bias of float32 stands beside exact products."""
        uneven = shape.depth.value != shape.width.value
        return self.crowded or self.exact_bias or uneven or shape.precision.value == "tf32"

    def distance_sums(self) -> _DistanceSums:
        heads, tiles = self.query.shape[1], _ceil(self.longest[0], self.shape(ROWS)[1].rows)
        ends = (2, self.sequences, heads, max(tiles, 1))
        between = (2, self.sequences, heads, max(2 * self.farthest - 1, 0))
        return _DistanceSums(*(self.query.new_zeros(sizes, dtype=torch.float32) for sizes in (ends, between)))

    def statistics(self, output, grad_output, lse, low, grad_lse, want_grad_sinks):
        """What the backward kernels read of each row beside its operands (statistics_kernel), base and delta, and the
        gradient of the sinks where it is wanted."""
        base, delta = torch.empty((2, *lse.shape), dtype=torch.float32, device=lse.device)
        batch, heads, rows = lse.shape
        shape, launch = self.shape(STATISTICS)
        tiles = _ceil(rows, launch.rows)
        grad_sinks = lse.new_empty((batch, heads, tiles)) if want_grad_sinks else None
        if programs := batch * heads * tiles:
            statistics_kernel[(programs,)](
                _rows(unit_last_stride(output)), _rows(grad_output), lse.contiguous(), low,
                None if grad_lse is None else grad_lse.contiguous(), base, delta, self.options.sinks, grad_sinks, heads,
                rows, shape, num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        return base, delta, lse.new_empty(0) if grad_sinks is None else grad_sinks.sum((0, 2))

    def shape(self, kind: str) -> tuple[Shape, Tile]:
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        depth, width = (max(16, power_of_2(n)) for n in (head_dim, value_dim))
        plain = self.fold and self.options.seed is None and not self.ragged
        widest = max(head_dim, value_dim)
        if kind != MASK and (self.crowded or (self.ragged and widest > 64)):
            widest = WIDEST
        tile = tile_for(self.query, kind, widest, plain)
        products = precision(self.query.dtype, self.query.device)
        constants = (tile.rows, tile.keys, head_dim, depth, value_dim, width, products, self.fold)
        return Shape(*map(tl.constexpr, constants)), tile


def _ceil(n: int, size: int) -> int:
    return -(-n // size)


def _rows(x) -> Rows:
    return Rows(x, *x.stride()[:3])


def _mask(x) -> Mask:
    steps = (None if n == 1 or step == 0 else step for n, step in zip(x.shape, x.stride(), strict=True))
    return Mask(x, *steps)


def _window(side: int) -> int | None:
    return None if side < 0 else min(side, MOST_TOKENS)


@kernel(KERNELS, "attention_forward", _refuses)
def attention_forward(query, key, value, *options):
    output = empty_rows_first(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    lse_low = torch.empty_like(lse)
    call = _Call(query, key, value, *options)
    operands = map(_rows, (call.query, call.key, call.value, output))
    call.run(forward_kernel, FORWARD, *operands, lse, lse_low)
    return output, lse, lse_low


@kernel(KERNELS, "attention_backward", _backward_refuses)
def attention_backward(grad_output, grad_lse, query, key, value, output, lse, lse_low, mask, *options):
    *given, want_grad_mask, want_grad_distance_bias, want_grad_sinks = options
    call = _Call(query, key, value, mask, *given)
    grad_output = unit_last_stride(grad_output)
    low = None if call.fold else lse_low.contiguous()  # of natural logits, which biases may make large
    base, delta, grad_sinks = call.statistics(output, grad_output, lse, low, grad_lse, want_grad_sinks)
    statistics = base, low, delta
    operands = [_rows(x) for x in (call.query, call.key, call.value, grad_output)]
    grad_query, grad_key, grad_value = (empty_rows_first(x, x.shape[3]) for x in (query, key, value))
    call.run(keys_kernel, KEYS, *operands, _rows(grad_key), _rows(grad_value), *statistics)
    sums = call.distance_sums() if want_grad_distance_bias else None
    call.run(rows_kernel, ROWS, *operands, _rows(grad_query), sums and sums.ends, *statistics)
    grad_distance_bias = torch.empty(0, dtype=torch.float32, device=query.device)
    if sums:
        call.run(distance_kernel, DISTANCE, *operands, sums.between, *statistics)
        grad_distance_bias = sums.total()
    grad_mask = torch.empty(mask.shape if want_grad_mask else (0,), dtype=torch.float32, device=query.device)
    if not want_grad_mask:
        pass
    elif mask.shape[3] != 1:
        sizes = tuple(mask.shape[:3])
        call.run(mask_kernel, MASK, *operands, grad_mask, *statistics, sizes, mask_sizes=sizes)
    else:
        grad_mask = _grad_of_row_bias(grad_lse, lse, lse_low, delta, call.options.sinks)
        grad_mask = grad_mask.sum_to_size(mask.shape).contiguous()
    return grad_query, grad_key, grad_value, grad_mask, grad_distance_bias, grad_sinks


def _grad_of_row_bias(grad_lse, lse, lse_low, delta, sinks):
    """A bias that is one for all keys of a row moves lse and, where there is a sink, what it leaves to the keys."""
    grad = torch.zeros_like(lse) if grad_lse is None else grad_lse
    if sinks is not None:
        grad = grad + torch.exp(sinks[:, None] - lse - lse_low) * delta
    return grad.masked_fill(lse == -math.inf, 0.0)[..., None]


def aot_calls(dtype: torch.dtype):
    """Every class of head dim, the features that training uses, and all of them at once (aot.py)."""
    yield "causal 128", lambda: _aot_call(dtype, 128, window_right=0)
    yield "causal 64", lambda: _aot_call(dtype, 64, window_right=0)
    yield "causal 256", lambda: _aot_call(dtype, 256, window_right=0)
    yield "causal 192", lambda: _aot_call(dtype, 192, window_right=0)
    for head_dim in (16, 24, 32, 72, 112, 200):  # narrow, in wider padding, of rows that are not aligned
        yield f"causal {head_dim}", lambda head_dim=head_dim: _aot_call(dtype, head_dim, window_right=0)
    yield "packed 96, window", lambda: _aot_call(dtype, 96, packed=True, window_left=512, window_right=0)
    yield "packed 64, dropout", lambda: _aot_call(dtype, 64, packed=True, dropout_p=0.1)
    yield "packed 64, sinks", lambda: _aot_call(dtype, 64, packed=True, window_left=127, window_right=0, sinks=True)
    for head_dim in (64, 80, 256):
        yield (
            f"everything {head_dim}",
            lambda head_dim=head_dim: _aot_call(
                dtype, head_dim, mask=(1, 16, 2048, 2048), alibi=True, window_left=512, window_right=0, softcap=30.0,
                dropout_p=0.1, grad_lse=True, farthest=128, sinks=True,
            ),
        )  # fmt: skip
    for head_dim in (16, 128):
        yield (
            f"all but distances {head_dim}",
            lambda head_dim=head_dim: _aot_call(
                dtype, head_dim, mask=(1, 16, 2048, 2048), alibi=True, window_right=0, softcap=30.0, dropout_p=0.1,
                sinks=True,
            ),
        )  # fmt: skip
    yield "packed 64, distances", lambda: _aot_call(dtype, 64, packed=True, dropout_p=0.1, farthest=128)
    yield "packed 128, distances", lambda: _aot_call(dtype, 128, packed=True, farthest=128)
    yield "padding 64", lambda: _aot_call(dtype, 64, mask=(2, 1, 1, 2048), mask_dtype=torch.bool)
    yield "learned bias 128", lambda: _aot_call(dtype, 128, mask=(1, 16, 2048, 2048))
    yield "softcap 128, window", lambda: _aot_call(dtype, 128, softcap=30.0, window_left=512, window_right=0)
    yield "causal 192, values 128", lambda: _aot_call(dtype, 192, value_dim=128, window_right=0)
    if dtype == torch.float32:
        yield "causal 128, TF32", lambda: _aot_call(dtype, 128, window_right=0)


def _aot_call(
    dtype, head_dim, packed=False, mask=None, mask_dtype=None, alibi=False, window_left=-1, window_right=-1,
    softcap=0.0, dropout_p=0.0, grad_lse=False, farthest=None, sinks=False, value_dim=None,
):  # fmt: skip
    """Forward and backward of 16 query heads over 4 key heads; a float mask and a bias by distance get theirs."""
    batch, heads, key_heads, tokens = 1 if packed else 2, 16, 4, 2048

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    query = meta(batch, tokens, heads, head_dim).transpose(1, 2)
    key, value = (meta(batch, tokens, key_heads, n).transpose(1, 2) for n in (head_dim, value_dim or head_dim))
    options = (
        meta(*mask, dtype=mask_dtype or dtype) if mask else None,
        meta(batch, heads, dtype=torch.float32) if alibi else None,
        meta(heads, 2 * farthest + 1, dtype=torch.float32) if farthest else None,
        meta(heads, dtype=torch.float32) if sinks else None,
        meta(5, dtype=torch.int32) if packed else None,
        meta(5, dtype=torch.int32) if packed else None,
        1024, 1024, meta(1, dtype=torch.int64), window_left, window_right, True, head_dim**-0.5, softcap, dropout_p,
    )  # fmt: skip
    output, lse, lse_low = attention_forward(query, key, value, *options)
    upstream = torch.empty_like(lse) if grad_lse else None
    wanted = (bool(mask) and mask_dtype != torch.bool, bool(farthest), sinks)
    attention_backward(torch.empty_like(output), upstream, query, key, value, output, lse, lse_low, *options, *wanted)
