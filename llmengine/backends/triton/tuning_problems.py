"""What `llmengine tune` measures in each slot of the tables: the calls that training makes of its kernels.

A slot serves more than the call that is timed. Beside it stand the calls that ask most of its tile, in registers and
shared memory: a tile with which one of them does not run is no candidate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.triton import attention_table, norm, relative_attention, rows, tiles
from llmengine.backends.triton.attention import attention_backward, attention_forward
from llmengine.backends.triton.attention_table import FORWARD, KEYS, MASK, ROWS
from llmengine.backends.triton.cross_entropy import WIDEST as LOSS_WIDEST
from llmengine.backends.triton.cross_entropy import cross_entropy_backward, cross_entropy_forward
from llmengine.backends.triton.device import architecture
from llmengine.backends.triton.embedding import WIDEST as EMBEDDING_WIDEST
from llmengine.backends.triton.embedding import embedding_forward
from llmengine.backends.triton.ffn import ffn_backward, ffn_forward
from llmengine.backends.triton.gemm import gemm
from llmengine.backends.triton.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from llmengine.backends.triton.relative_attention import (
    DISTANCES,
    relative_attention_backward,
    relative_attention_forward,
)
from llmengine.backends.triton.softmax import softmax_backward, softmax_forward
from llmengine.backends.triton.tuning import Call, Problem

WIDEST_HEAD = 256
# Bytes that a problem takes at most for each element: of attention's operands, which each call has of its own, of rows.
OF_OPERANDS, OF_ROWS = 256, 64


@dataclass(frozen=True)
class Place:
    """Where tensors lie, and how large they are. half: the 16-bit dtype that stands for both. most: rows' elements."""

    device: torch.device
    half: torch.dtype = torch.bfloat16
    batch: int = 2
    heads: int = 16
    tokens: int = 4096
    most: int = 2**28

    @classmethod
    def on(cls, device: torch.device) -> Place:
        """As large as there is room for on the GPU."""
        room = torch.cuda.mem_get_info(device)[0]
        tokens = cls.tokens
        while tokens > 256 and cls.batch * cls.heads * tokens * WIDEST_HEAD * OF_OPERANDS > room:
            tokens //= 2
        return cls(device, tokens=tokens, most=min(cls.most, room // OF_ROWS))

    def randn(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)

    def operands_dtype(self, operands: str) -> torch.dtype:
        return torch.float32 if operands == "float32" else self.half


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(place: Place) -> Iterator[Problem]:
    """Slots in the order in which they matter: what most models run comes first."""
    tables = attention_table.table(architecture(place.device))
    slots = [
        (operands, kernel, widest)
        for operands in ("plain", "busy", "float32")
        for widest in (128, 64, 96, 112, 192, 256)
        for kernel, served in tables[operands].items()
        if widest in served
    ]
    for operands, kernel, widest in slots:
        built_in = tables[operands][kernel][widest]
        calls = functools.partial(_attention_calls, place, operands, kernel, widest)
        yield Problem(attention_table.slot(operands, kernel, widest), built_in, calls)


def _attention_calls(place: Place, operands: str, kernel: str, widest: int) -> Iterator[Call]:
    backward, dtype = kernel != FORWARD, place.operands_dtype(operands)

    def call(**options) -> Call:
        return _Attention(place, dtype, widest, **options).call(backward)

    if kernel == MASK:
        yield call(mask=True)
        yield call(mask=True, softcap=30.0, alibi=True, dropout_p=0.1)
        return
    yield call(dropout_p=0.1) if operands == "busy" else call()
    yield call(packed=True, window=place.tokens // 4, dropout_p=0.1 if operands == "busy" else 0.0)
    if operands != "plain":
        yield call(packed=True, window=place.tokens // 4, softcap=30.0, alibi=True, dropout_p=0.1)
        if widest == 256:  # what takes all options at once, at any head dim
            yield call(mask=True, softcap=30.0, alibi=True, dropout_p=0.1, distances=True)
        else:
            yield call(mask=True, softcap=30.0, alibi=True)
            yield call(mask=True, softcap=30.0, dropout_p=0.1)


class _Attention:
    """Causal attention of equal rows and keys."""

    def __init__(
        self, place: Place, dtype: torch.dtype, head_dim: int, packed: bool = False, window: int = -1,
        mask: bool = False, alibi: bool = False, distances: bool = False, softcap: float = 0.0, dropout_p: float = 0.0,
    ) -> None:  # fmt: skip
        batch, heads, tokens = place.batch, place.heads, place.tokens
        shape = (1, batch * tokens, heads, head_dim) if packed else (batch, tokens, heads, head_dim)
        self.operands = [place.randn(*shape, dtype=dtype).transpose(1, 2) for _ in range(4)]
        self.learned = mask, distances
        cu = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=place.device) if packed else None
        slopes = torch.full((batch, heads), 0.01, device=place.device) if alibi else None
        table = place.randn(heads, 257, dtype=torch.float32) if distances else None
        seed = torch.ones(1, dtype=torch.int64, device=place.device)
        self.options = (
            place.randn(1, 1, tokens, tokens, dtype=dtype) if mask else None, slopes, table, None, cu, cu, tokens,
            tokens, seed, window, 0, True, head_dim**-0.5, softcap, dropout_p,
        )  # fmt: skip

    def call(self, backward: bool) -> Call:
        *operands, grad_output = self.operands
        if not backward:
            return lambda: attention_forward(*operands, *self.options)[:2]
        results = attention_forward(*operands, *self.options)
        wanted = (*self.learned, False)
        return lambda: attention_backward(grad_output, None, *operands, *results, *self.options, *wanted)


# ---- products --------------------------------------------------------------------------------------------------------

SHAPES = ((8192, 4096, 4096), (4096, 1024, 1024), (1024, 1024, 1024), (256, 512, 512))  # rows, depth, columns


def products(place: Place, shapes: Iterable[tuple[int, int, int]] = SHAPES) -> Iterator[Problem]:
    """The slots that one of the shapes reaches on this GPU."""
    seen: set[str] = set()
    for kind, dtype, (height, depth, columns) in itertools.product(PRODUCTS, (place.half, torch.float32), shapes):
        depth += kind == "ragged"
        x, w = (torch.empty(n, depth, dtype=dtype, device=place.device) for n in (height, columns))
        slot, built_in = tiles.slot_of(kind, x, w.T)
        if slot not in seen:
            seen.add(slot)
            yield Problem(slot, built_in, functools.partial(_product_calls, place, kind, dtype, height, depth, columns))


def _product_calls(place: Place, kind: str, dtype: torch.dtype, height: int, depth: int, columns: int) -> list[Call]:
    x, w = place.randn(height, depth, dtype=dtype), place.randn(columns, depth, dtype=dtype, scale=depth**-0.5)
    return PRODUCTS[kind](x, w)


def _plain(x: Tensor, w: Tensor) -> list[Call]:
    return [lambda: [gemm(x, w.T)], lambda: [gemm(x, w.T, second=(x, w.T))]]


def _fused(x: Tensor, w: Tensor) -> list[Call]:
    sums = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    more = [lambda: [gemm(x, w.T, out=sums.clone(), added=True)], lambda: [gemm(x, w.T, residual=sums.to(x.dtype))]]
    return [_ffn(x, w, False), *more, _loss(x, w)]


def _pair(x: Tensor, w: Tensor) -> list[Call]:
    return [_ffn(x, w, True), _ffn_gradients(x, w)]


def _ragged(x: Tensor, w: Tensor) -> list[Call]:
    return [*_plain(x, w), *_fused(x, w), *_pair(x, w)]


PRODUCTS: dict[str, Callable[[Tensor, Tensor], list[Call]]] = {
    "plain": _plain, "fused": _fused, "pair": _pair, "ragged": _ragged,
}  # fmt: skip


def _ffn(x: Tensor, w: Tensor, gated: bool) -> Call:
    gate, down = w.flip(0) if gated else None, w.T.contiguous()
    return lambda: ffn_forward(x, w, None, gate, None, down, None, None, None, "silu", 0.0, True)


def _ffn_gradients(x: Tensor, w: Tensor) -> Call:
    gate, down, seed = w.flip(0), w.T.contiguous(), torch.ones(1, dtype=torch.int64, device=x.device)
    output, *saved = ffn_forward(x, w, None, gate, None, down, None, None, seed, "silu", 0.1, True)
    wanted = [True, True, False, True, False, True, False]
    return lambda: ffn_backward(
        output, x, w, None, gate, None, down, *saved, seed, "silu", 0.1, None, None, None, wanted
    )


def _loss(x: Tensor, w: Tensor) -> Call:
    """With every option, and its gradients."""
    target = torch.arange(x.shape[0], device=x.device) % w.shape[0]
    bias, weight = w[:, 0].contiguous(), torch.ones(w.shape[0], device=x.device)
    options = ("mean", -100, 0.1, 1e-4, 30.0)

    def call() -> list[Tensor]:
        loss, lse, normaliser = linear_cross_entropy_forward(x, w, bias, target, weight, *options)
        gradients = linear_cross_entropy_backward(
            loss, x, w, bias, target, weight, lse, normaliser, *options, 0.0, None, [True] * 3
        )
        return [loss, lse, *gradients]

    return call


# ---- rows ------------------------------------------------------------------------------------------------------------

WIDTHS = (1024, 4096, 2048, 8192, 16384, 512, 128, 32768, 131072)


def row_kernels(place: Place, widths: Iterable[int] = WIDTHS) -> Iterator[Problem]:
    """The slots that rows of one of the widths reach; a wide row's tiles serve all that are wider."""
    seen: set[str] = set()
    for width, dtype in itertools.product(widths, (place.half, torch.float32)):
        x = torch.empty(0, dtype=dtype, device=place.device)
        for kernel, (widest, calls) in ROW_KERNELS.items():
            slot, built_in, block = rows.slot_of(kernel, x, width, widest())
            swept = kernel in ("norm backward", "norm backward wide") and (block >= width) == kernel.endswith("wide")
            if slot not in seen and not swept:
                seen.add(slot)
                yield Problem(slot, built_in, functools.partial(_row_calls, place, calls, width, dtype))


def _row_calls(place: Place, calls: Callable[[Tensor], list[Call]], width: int, dtype: torch.dtype) -> list[Call]:
    return calls(place.randn(min(place.batch * place.tokens, place.most // width), width, dtype=dtype))


def _norms(x: Tensor) -> list[Call]:
    """Of rows alone, and with all that may stand in front of a norm."""
    line, seed = torch.ones_like(x[0]), torch.ones(1, dtype=torch.int64, device=x.device)
    return [
        lambda: norm.norm_forward(x, None, line, None, None, 1e-5, 0.0, False)[:1],
        lambda: norm.norm_forward(x, x, line, line, seed, 1e-5, 0.1, True),
    ]


def _norm_gradients(x: Tensor) -> list[Call]:
    calls: list[Call] = []
    for subtract_mean, added in ((False, False), (True, True)):
        seed = torch.ones(1, dtype=torch.int64, device=x.device) if added else None
        line, dropout_p, more = torch.ones_like(x[0]), 0.1 if added else 0.0, x if added else None
        _, _, mean, rstd = norm.norm_forward(x, more, line, None, seed, 1e-5, dropout_p, subtract_mean)
        args = (x, more, x, line, mean, rstd, seed, dropout_p, subtract_mean, added)
        calls.append(functools.partial(norm.norm_backward, *args))
    return calls


def _softmax(x: Tensor) -> list[Call]:
    return [lambda: [softmax_forward(x, x.dtype)]]


def _softmax_gradients(x: Tensor) -> list[Call]:
    y = softmax_forward(x, x.dtype)
    return [lambda: [softmax_backward(x, y, x.dtype)]]


def _losses(x: Tensor) -> list[Call]:
    return [functools.partial(cross_entropy_forward, x, *options) for options in _loss_options(x)]


def _loss_gradients(x: Tensor) -> list[Call]:
    calls: list[Call] = []
    for target, weight, *options in _loss_options(x):
        _, lse, normaliser = cross_entropy_forward(x, target, weight, *options)
        args = (torch.ones_like(normaliser), x, target, weight, lse, normaliser, *options)
        calls.append(functools.partial(_listed, cross_entropy_backward, *args))
    return calls


def _listed(function: Callable[..., Tensor], *args) -> list[Tensor]:
    return [function(*args)]


def _loss_options(x: Tensor) -> list[tuple]:
    target = torch.arange(x.shape[0], device=x.device) % x.shape[1]
    weight = torch.ones(x.shape[1], device=x.device)
    return [(target, None, "mean", -100, 0.0, 0.0, 0.0), (target, weight, "mean", -100, 0.1, 1e-4, 30.0)]


def _embeddings(x: Tensor) -> list[Call]:
    ids = torch.arange(x.shape[0], device=x.device).flip(0)
    return [lambda: [embedding_forward(ids, x, 1.0)]]


# By the kernel's name in rows.py: its widest tile, and its calls. Those of the norm's backward share one.
ROW_KERNELS: dict[str, tuple[Callable[[], int | None], Callable[[Tensor], list[Call]]]] = {
    "norm forward": (lambda: None, _norms),
    "norm backward": (lambda: norm.BACKWARD_WIDEST, _norm_gradients),
    "norm backward wide": (lambda: norm.BACKWARD_WIDEST // 2, _norm_gradients),
    "loss forward": (lambda: LOSS_WIDEST, _losses),
    "loss backward": (lambda: LOSS_WIDEST, _loss_gradients),
    "softmax forward": (lambda: None, _softmax),
    "softmax backward": (lambda: None, _softmax_gradients),
    "embedding": (lambda: EMBEDDING_WIDEST, _embeddings),
}


# ---- relative attention ----------------------------------------------------------------------------------------------


HEAD_DIMS = (64, 128, 256, 32)


def relative(place: Place) -> Iterator[Problem]:
    """Timed with the first of the head dims that a slot serves; the widest of them must run, too."""
    seen: set[str] = set()
    for head_dim, dtype, kernel in itertools.product(
        HEAD_DIMS, (place.half, torch.float32), (FORWARD, KEYS, ROWS, DISTANCES)
    ):
        query = torch.empty(0, dtype=dtype, device=place.device)
        slots = {d: relative_attention.slot_of(kernel, query, d) for d in HEAD_DIMS}
        if slots[head_dim][0] not in seen:
            seen.add(slots[head_dim][0])
            widest = max(d for d in HEAD_DIMS if slots[d] == slots[head_dim])
            calls = functools.partial(_relative_calls, place, dtype, head_dim, widest, kernel != FORWARD)
            yield Problem(*slots[head_dim], calls)


def _relative_calls(place: Place, dtype: torch.dtype, head_dim: int, widest: int, backward: bool) -> Iterator[Call]:
    yield _relative_call(place, dtype, head_dim, backward)
    yield _relative_call(place, dtype, widest, backward, positions=True, dropout_p=0.1)


def _relative_call(
    place: Place, dtype: torch.dtype, head_dim: int, backward: bool, positions: bool = False, dropout_p: float = 0.0
) -> Call:
    """XLNet's content stream, or its query stream (positions); sequences a quarter as long as attention's, and four
    times as many."""
    sequences, tokens = 4 * place.batch, place.tokens // 4
    total = sequences * tokens

    def numbers(n: Tensor) -> Tensor:
        return n.to(torch.int32).repeat(sequences)

    each = torch.arange(tokens, device=place.device)
    *operands, grad_output = (
        place.randn(1, n, place.heads, head_dim, dtype=dtype).transpose(1, 2)
        for n in (total, total, total, total, 2 * tokens - 1, total)
    )
    cu = torch.arange(0, total + 1, tokens, dtype=torch.int32, device=place.device)
    segments, ranks = numbers(each * 2 // tokens), numbers(each.flip(0))
    options = (
        place.randn(total, place.heads, 2, dtype=torch.float32), segments, segments,
        numbers(each) if positions else None, ranks, ranks, cu, cu, tokens, tokens,
        torch.ones(1, dtype=torch.int64, device=place.device), tokens - 1, False, not positions, head_dim**-0.5,
        dropout_p,
    )  # fmt: skip
    if not backward:
        return lambda: relative_attention_forward(*operands, *options)[:1]
    results = relative_attention_forward(*operands, *options)
    return lambda: relative_attention_backward(grad_output, None, *results, *operands, *options)


PROBLEMS: dict[str, Callable[[Place], Iterator[Problem]]] = {
    "attention": attention, "products": products, "rows": row_kernels, "relative": relative,
}  # fmt: skip
