"""What `llmengine tune` measures in each slot of the tables: the calls that training makes of its kernels.

A slot serves more than the call that is timed. Beside it stand the calls that ask most of its tile, in registers and
shared memory: a tile with which one of them does not run is no candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.triton import attention_table, tiles
from llmengine.backends.triton.attention import attention_backward, attention_forward
from llmengine.backends.triton.attention_table import FORWARD, MASK
from llmengine.backends.triton.device import architecture
from llmengine.backends.triton.ffn import ffn_backward, ffn_forward
from llmengine.backends.triton.gemm import gemm
from llmengine.backends.triton.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from llmengine.backends.triton.tuning import Call, Problem


@dataclass(frozen=True)
class Place:
    """Where tensors lie, and how large they are. half: the 16-bit dtype that stands for both."""

    device: torch.device
    half: torch.dtype = torch.bfloat16
    batch: int = 2
    heads: int = 16
    tokens: int = 4096

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
        for widest in (128, 64, 96, 192, 256)
        for kernel, served in tables[operands].items()
        if widest in served
    ]
    for operands, kernel, widest in slots:
        timed, *others = _attention_calls(place, operands, kernel, widest)
        built_in = tables[operands][kernel][widest]
        yield Problem(attention_table.slot(operands, kernel, widest), built_in, timed, tuple(others))


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
        yield call(mask=True, softcap=30.0, alibi=True, dropout_p=0.1, distances=widest == 256)


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
    for kind, dtype, (rows, depth, columns) in itertools.product(PRODUCTS, (place.half, torch.float32), shapes):
        depth += kind == "ragged"
        x, w = place.randn(rows, depth, dtype=dtype), place.randn(columns, depth, dtype=dtype, scale=depth**-0.5)
        slot, built_in = tiles.slot_of(kind, x, w.T)
        if slot not in seen:
            seen.add(slot)
            timed, *others = PRODUCTS[kind](x, w)
            yield Problem(slot, built_in, timed, tuple(others))


def _plain(x: Tensor, w: Tensor) -> list[Call]:
    return [lambda: [gemm(x, w.T)], lambda: [gemm(x, w.T, second=(x, w.T))]]


def _fused(x: Tensor, w: Tensor) -> list[Call]:
    sums = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    return [_ffn(x, w, False), lambda: [gemm(x, w.T, out=sums.clone(), added=True)], _loss(x, w)]


def _pair(x: Tensor, w: Tensor) -> list[Call]:
    return [_ffn(x, w, True), _ffn_gradients(x, w)]


def _ragged(x: Tensor, w: Tensor) -> list[Call]:
    return [*_plain(x, w), *_fused(x, w), *_pair(x, w)]


PRODUCTS: dict[str, Callable[[Tensor, Tensor], list[Call]]] = {
    "plain": _plain, "fused": _fused, "pair": _pair, "ragged": _ragged,
}  # fmt: skip


def _ffn(x: Tensor, w: Tensor, gated: bool) -> Call:
    gate, down = w.flip(0) if gated else None, w.T.contiguous()
    return lambda: ffn_forward(x, w, None, gate, None, down, None, None, "silu", 0.0, True)


def _ffn_gradients(x: Tensor, w: Tensor) -> Call:
    gate, down, seed = w.flip(0), w.T.contiguous(), torch.ones(1, dtype=torch.int64, device=x.device)
    output, *saved = ffn_forward(x, w, None, gate, None, down, None, seed, "silu", 0.1, True)
    wanted = [True, True, False, True, False, True, False]
    return lambda: ffn_backward(output, x, w, gate, down, *saved, seed, "silu", 0.1, wanted)


def _loss(x: Tensor, w: Tensor) -> Call:
    """With every option, and its gradients."""
    target = torch.arange(x.shape[0], device=x.device) % w.shape[0]
    bias, weight = w[:, 0].contiguous(), torch.ones(w.shape[0], device=x.device)
    options = ("mean", -100, 0.1, 1e-4, 30.0)

    def call() -> list[Tensor]:
        loss, lse, normaliser = linear_cross_entropy_forward(x, w, bias, target, weight, *options)
        gradients = linear_cross_entropy_backward(
            loss, x, w, bias, target, weight, lse, normaliser, *options, 0.0, [True] * 3
        )
        return [loss, lse, *gradients]

    return call
