"""Relative attention in Triton: what is refused, and the launches of relative_forward.py and relative_backward.py."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.triton import tuned
from llmengine.backends.triton.attention import MOST_TOKENS, WIDEST
from llmengine.backends.triton.attention_backward import statistics_kernel
from llmengine.backends.triton.attention_table import FORWARD, KEYS, ROWS, STATISTICS, Tile, tile_for
from llmengine.backends.triton.attention_tile import Rows, Shape, Sizes
from llmengine.backends.triton.device import (
    architecture,
    dropped_below,
    is_amd,
    precision,
    refuses_tensors,
    unit_last_stride,
)
from llmengine.backends.triton.relative_backward import distances_kernel, keys_kernel, rows_kernel
from llmengine.backends.triton.relative_forward import forward_kernel
from llmengine.backends.triton.relative_tile import Relative
from llmengine.backends.triton.rows import power_of_2
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}

OPERANDS = 5  # query, position_query, key, value, position_key
DISTANCES = "distances"
# By the bytes of an element, and the widest head dim that a tile serves; chosen as attention's (attention_table.py),
# by what compiles without a spill. float32 heads beyond 128 spill in distances_kernel whatever the tile.
TILES = {
    2: {
        FORWARD: {64: Tile(64, 64, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        ROWS: {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        KEYS: {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        DISTANCES: {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 2)},
    },
    4: {
        FORWARD: {64: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        ROWS: {64: Tile(64, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        KEYS: {64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
        DISTANCES: {256: Tile(16, 16, 8, 1)},
    },
}
# Where 16-bit tiles of those sizes spill: NVIDIA's GPUs before Hopper, and consumer ones; one of Blackwell's.
AMPERE = {FORWARD: {64: Tile(64, 32, 8, 1)}, ROWS: {64: Tile(32, 32, 8, 1)}}
_BLACKWELL = {ROWS: AMPERE[ROWS]}
_DATACENTRE = {"sm_90": {}, "sm_100": _BLACKWELL, "sm_103": _BLACKWELL}
_INTERPRETER = Tile(64, 64, 1, 1)


def slot_of(kind: str, query: Tensor, widest: int) -> tuple[str, Tile]:
    """The place in the tables that serves heads of that dim, by name, and the tile there."""
    place = architecture(query.device)
    cdna = is_amd(place)  # tiles of wider heads there, and four warps, which have more registers
    table = TILES[query.element_size()][kind]
    if query.element_size() == 2 and not cdna:
        table = table | _DATACENTRE.get(place, AMPERE).get(kind, {})
    served = min(s for s in table if s >= min(widest * (1 + cdna), WIDEST))
    operands = "16-bit" if query.element_size() == 2 else "float32"
    return f"relative {kind} {operands} {served}", table[served]._replace(warps=4) if cdna else table[served]


def _refuses(query, position_query, key, value, position_key, *options):
    if reason := refuses_tensors(query, position_query, key, value, position_key):
        return reason
    if (widest := max(query.shape[3], value.shape[3])) > WIDEST:
        return f"the triton backend takes head dims up to {WIDEST}, got {widest}"
    if (tokens := max(x.shape[2] for x in (query, key, position_key))) > MOST_TOKENS:
        return f"the triton backend takes up to {MOST_TOKENS} tokens or distances, got {tokens}"
    return None


def _backward_refuses(grad_output, grad_lse, output, lse, lse_low, *args):
    return refuses_tensors(grad_output, grad_lse, output, lse) or _refuses(*args)


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(
        self, query, position_query, key, value, position_key, segment_scores, query_segments, key_segments,
        query_positions, query_ranks, key_ranks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seed,
        zero_distance, is_causal, include_self, scale, dropout_p,
    ):  # fmt: skip
        self.operands = [_rows(unit_last_stride(x)) for x in (query, position_query, key, value)]
        self.query, self.value, self.distances = query, value, position_key.shape[2]
        self.longest = max_seqlen_q, max_seqlen_k
        self.sequences = cu_seqlens_q.shape[0] - 1
        numbers = (segment_scores, query_segments, key_segments, query_positions, query_ranks, key_ranks)
        scores, of_rows, of_keys, positions, ranks, ranks_of_keys = (
            None if x is None else x.contiguous() for x in numbers
        )
        self.option = Relative(
            cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), seed if dropout_p else None,
            dropped_below(dropout_p), 1 / (1 - dropout_p), _rows(unit_last_stride(position_key)), self.distances,
            zero_distance, scores, of_rows, of_keys, positions, ranks, ranks_of_keys, tl.constexpr(is_causal),
            tl.constexpr(include_self), scale,
        )  # fmt: skip

    def run(self, kernel, kind: str, *operands) -> None:
        """kernel[programs](*operands, sizes, option, shape): programs own tiles of rows or keys of every head and
        sequence, or blocks of distances of every head."""
        shape, tile = self.shape(kind)
        if kind == DISTANCES:
            self._launch(kernel, _ceil(self.distances, tile.keys), 1, operands, shape, tile)
        else:
            longest, size = (self.longest[1], tile.keys) if kind == KEYS else (self.longest[0], tile.rows)
            self._launch(kernel, max(_ceil(longest, size), 1), self.sequences + 1, operands, shape, tile)

    def _launch(self, kernel, tiles, blocks, operands, shape, tile) -> None:
        heads, rows = self.query.shape[1:3]
        if programs := tiles * heads * blocks:
            sizes = Sizes(tiles, heads, heads, self.sequences, rows, self.value.shape[2])
            launch = {"num_warps": tile.warps, "num_stages": tile.stages}
            kernel[(programs,)](*operands, sizes, self.option, shape, **launch)

    def statistics(self, output, grad_output, lse, grad_lse):
        """lse with 0 for -inf, and delta, of each row (attention's statistics_kernel)."""
        base, delta = torch.empty((2, *lse.shape), dtype=torch.float32, device=lse.device)
        _, heads, rows = lse.shape
        shape, tile = self.shape(STATISTICS)
        if programs := heads * _ceil(rows, tile.rows):
            statistics_kernel[(programs,)](
                _rows(unit_last_stride(output)), grad_output, lse.contiguous(), None, grad_lse, base, delta, None,
                None, heads, rows, shape, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return base, delta

    def shape(self, kind: str) -> tuple[Shape, Tile]:
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        depth, width = (max(16, power_of_2(n)) for n in (head_dim, value_dim))
        widest = max(head_dim, value_dim)
        if kind == STATISTICS:
            tile = tile_for(self.query, kind, widest, False)
        elif architecture(self.query.device) == "interpreter":
            tile = _INTERPRETER
        else:
            tile = tuned.tile(*slot_of(kind, self.query, widest), self.query.device)
        products = precision(self.query.dtype, self.query.device)
        constants = (tile.rows, tile.keys, head_dim, depth, value_dim, width, products, False)
        return Shape(*map(tl.constexpr, constants)), tile


def _ceil(n: int, size: int) -> int:
    return -(-n // size)


def _rows(x) -> Rows:
    return Rows(x, *x.stride()[:3])


@kernel(KERNELS, "relative_attention_forward", _refuses)
def relative_attention_forward(*args):
    query, value = args[0], args[3]
    output = empty_rows_first(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    lse_low = torch.empty_like(lse)
    call = _Call(*args)
    call.run(forward_kernel, FORWARD, *call.operands, _rows(output), lse, lse_low)
    return output, lse, lse_low


@kernel(KERNELS, "relative_attention_backward", _backward_refuses)
def relative_attention_backward(grad_output, grad_lse, output, lse, lse_low, *args):
    call, segment_scores = _Call(*args), args[OPERANDS]
    gradients = [empty_rows_first(x, x.shape[3]) for x in args[:OPERANDS]]
    of_query, of_position_query, of_key, of_value, of_position_key = map(_rows, gradients)
    grad_segments = args[0].new_zeros((0,) if segment_scores is None else segment_scores.shape, dtype=torch.float32)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_output = _rows(unit_last_stride(grad_output))
    base, delta = call.statistics(output, grad_output, lse, grad_lse)
    operands, statistics = (*call.operands, grad_output), (base, lse_low.contiguous(), delta)
    call.run(rows_kernel, ROWS, *operands, of_query, of_position_query, grad_segments, grad_lse, *statistics)
    call.run(keys_kernel, KEYS, *operands, of_key, of_value, *statistics)
    call.run(distances_kernel, DISTANCES, *operands, of_position_key, *statistics)
    return *gradients, grad_segments


def aot_calls(dtype: torch.dtype):
    """XLNet's two streams, Transformer-XL, and every class of head dim (aot.py)."""
    yield "content stream 64", lambda: _aot_call(dtype, 64, segments=True, ranks=True, include_self=True)
    yield "query stream 64", lambda: _aot_call(dtype, 64, segments=True, ranks=True, positions=True, dropout_p=0.1)
    for head_dim in (64, 128) if dtype == torch.float32 else (64, 128, 256):
        yield f"causal {head_dim}", lambda head_dim=head_dim: _aot_call(dtype, head_dim, is_causal=True)
    if dtype == torch.float32:
        yield "causal 64, TF32", lambda: _aot_call(dtype, 64, is_causal=True)


def _aot_call(dtype, head_dim, segments=False, ranks=False, positions=False, is_causal=False, include_self=False,
              dropout_p=0.0):  # fmt: skip
    heads, tokens = 16, 2048

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def numbers(wanted):
        return meta(tokens, dtype=torch.int32) if wanted else None

    operands = [meta(1, n, heads, head_dim).transpose(1, 2) for n in (tokens,) * 4 + (1023,)]
    options = (
        meta(tokens, heads, 2, dtype=torch.float32) if segments else None, numbers(segments), numbers(segments),
        numbers(positions), numbers(ranks), numbers(ranks), meta(5, dtype=torch.int32), meta(5, dtype=torch.int32),
        512, 512, meta(1, dtype=torch.int64), 511, is_causal, include_self, head_dim**-0.5, dropout_p,
    )  # fmt: skip
    output, lse, lse_low = relative_attention_forward(*operands, *options)
    relative_attention_backward(torch.empty_like(output), None, output, lse, lse_low, *operands, *options)
