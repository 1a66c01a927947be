"""Kernels that memory limits move every byte once, 16 at a time: what the simulator counted, tensor by tensor, against
what the heads of their files in csrc/cuda say. Where a row is too wide for registers the factor is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmengine
from llmengine import functional
from llmengine.backends.cuda.native import PRODUCTS, Native
from llmengine.optim import AdamW, gradient_norm

from .harness import Break, assert_caught

ROWS = 8
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
IN, OUT = (1, 0), (0, 1)  # how often each byte of a tensor is read and written


@dataclass
class Call:
    """A call of the native module, and what its launches moved of each tensor."""

    kernel: str
    tensors: dict[str, list[Tensor]]
    moved: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0, 0]))

    def size(self, name: str) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors[name])

    def times(self, name: str) -> tuple[Fraction, Fraction]:
        _, bytes_read, _, bytes_written = self.moved[name]
        return Fraction(bytes_read, self.size(name)), Fraction(bytes_written, self.size(name))

    def narrowest(self, name: str) -> Fraction:
        """Bytes of an access, on the average of reads or of writes."""
        reads, bytes_read, writes, bytes_written = self.moved[name]
        return min(Fraction(b, n) for b, n in ((bytes_read, reads), (bytes_written, writes)) if n)


@pytest.fixture(autouse=True)
def calls(native, monkeypatch) -> list[Call]:
    native.set_schedule("forward", 0)
    monkeypatch.setenv(PRODUCTS, "blas")
    seen: list[Call] = []
    launch = Native.call

    def noted(self, kernel: str, on: Tensor, **arguments: Any) -> None:
        launch(self, kernel, on, **arguments)
        given = {name: x if isinstance(x, list) else [x] for name, x in arguments.items()}
        call = Call(kernel, {name: x for name, x in given.items() if x and isinstance(x[0], Tensor)})
        for _, tensor, *counts in self.module.moved():
            call.moved[tensor] = [a + b for a, b in zip(call.moved[tensor], counts, strict=True)]
        seen.append(call)

    monkeypatch.setattr(Native, "call", noted)
    return seen


def assert_moves(call: Call, expected: dict[str, tuple], lines: dict[str, int] | None = None, width: float = 16):
    """`lines`: parameters of all rows, which come once a row, so many times, from the cache; each thread may ask for
    its label's besides. What is named nowhere must be small: a number of a row, or of the call, that threads ask for.
    """
    lines = lines or {}
    largest = max(call.size(name) for name in expected)
    for name in call.moved:
        what = f"{call.kernel}: {name}, moved in {float(call.narrowest(name)):.4g} bytes at a time"
        if name in expected:
            assert call.times(name) == expected[name], f"{what}: not as often as it should be"
            assert call.narrowest(name) >= width, f"{what}: too few"
        elif name in lines:
            reads, writes = call.times(name)
            assert lines[name] <= reads <= 1.3 * lines[name] and writes == 0, f"{what}: not once a row"
        else:
            assert 64 * call.size(name) <= largest, f"{what}: nobody expects it"
    assert expected.keys() | lines.keys() <= call.moved.keys(), f"{call.kernel} leaves out tensors"


def run(function: Callable[..., Any], *leaves: Tensor) -> None:
    """Forward and backward."""
    given = [t.detach().requires_grad_() for t in leaves]
    torch.manual_seed(3)
    with llmengine.backend("cuda_sim"):
        outputs = function(*given)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        torch.autograd.grad(outputs, given, [torch.randn_like(y) for y in outputs])


def rows_of(columns: int, dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    return [torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]


# ---- norms -----------------------------------------------------------------------------------------------------------

HELD_FORWARD, HELD_BACKWARD = 16_384, 4096  # columns


# Four rows to a block; held both ways; held in the forward alone; read again both ways.
@pytest.mark.parametrize("columns", [768, 4096, 8192, 16_400])
@pytest.mark.parametrize("fused", [False, True], ids=["", "residual and dropout"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@DTYPES
def test_norms(kind: str, fused: bool, dtype: torch.dtype, columns: int, calls: list[Call]):
    norm = getattr(functional, f"add_{kind}_norm" if fused else f"{kind}_norm")
    options = {"dropout_p": 0.1} if fused else {}
    parameters = [torch.randn(columns).to(dtype) for _ in range(2 if kind == "layer" else 1)]
    rows = rows_of(columns, dtype, 1 + fused)
    run(lambda *t: norm(*t[: 1 + fused], (columns,), *t[1 + fused :], **options), *rows, *parameters)
    forward, backward = calls

    wide = columns > HELD_FORWARD
    again = {"layer": 2, "rms": 1}[kind] if wide else 0  # for the variance, for the output
    lines = {"weight": ROWS, "bias": ROWS} if kind == "layer" else {"weight": ROWS}
    if fused:
        sums = {"input": IN, "residual": IN, "new_residual": (again, 1), "output": OUT}
    else:
        sums = {"input": (1 + again, 0), "output": OUT}
    assert_moves(forward, sums, lines)

    times = 1 if columns <= HELD_BACKWARD else 2
    moved = {"grad_output": (times, 0), "h": (times, 0), "grad_input": OUT}
    if fused:
        moved |= {"grad_new_residual": IN, "grad_residual": OUT}
    # Wide rows come two at a time, and add to what those before them left; the blocks' shares are then read once.
    blocks = backward.tensors["partial"][0].shape[0]
    shares = Fraction(ROWS, 2 * blocks) if times == 2 else 1
    moved["partial"] = (shares, shares)
    sums = {name: backward.moved.pop(name) for name in ("grad_weight", "grad_bias") if name in backward.moved}
    assert all(writes == columns and bytes_written == 4 * columns for _, _, writes, bytes_written in sums.values())
    assert_moves(backward, moved, {"weight": ROWS})


# ---- softmax and cross-entropy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [768, 8192, 16_384, 16_400])
@DTYPES
def test_softmax(dtype: torch.dtype, columns: int, calls: list[Call]):
    run(lambda x: functional.softmax(x, -1), *rows_of(columns, dtype))
    forward, backward = calls
    assert_moves(forward, {"input": (1 if columns <= 16_384 else 2, 0), "output": OUT})
    times = 1 if columns <= 8192 else 2
    assert_moves(backward, {"output": (times, 0), "grad_output": (times, 0), "grad_input": OUT})


# 1001: no row but every eighth begins at a multiple of 16 bytes.
@pytest.mark.parametrize("classes", [768, 1001, 16_400])
@pytest.mark.parametrize("everything", [False, True], ids=["", "all options"])
@DTYPES
def test_cross_entropy(everything: bool, dtype: torch.dtype, classes: int, calls: list[Call]):
    weight = torch.rand(classes) if everything else None
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0} if everything else {}
    target = torch.arange(ROWS) * 90
    run(lambda x: functional.cross_entropy(x, target, weight, **options), *rows_of(classes, dtype))
    forward, backward = calls
    lines = {"weight": ROWS} if everything else {}
    label = Fraction(1, classes)  # the label's logit comes once more
    width = 15.8 if classes != 1001 else 11
    assert_moves(forward, {"input": (1 + label, 0)}, lines, width)
    assert_moves(backward, {"input": IN, "grad_input": OUT}, lines, min(width + 0.2, 16))


# ---- rotary embedding, feed-forward block, embedding -----------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@DTYPES
def test_rotary_embedding(dtype: torch.dtype, interleaved: bool, calls: list[Call]):
    batch, tokens, heads, dim = 2, 16, 4, 64
    angles = torch.rand(tokens, dim // 2)
    x = torch.randn(batch, tokens, heads, dim).to(dtype)
    run(lambda x: functional.rotary_embedding(x, angles.cos(), angles.sin(), interleaved=interleaved), x)
    forward, backward = calls
    lines = {"cos": batch * heads, "sin": batch * heads}  # a thread's turn at heads begins with them: here it has one
    assert_moves(forward, {"input": IN, "output": OUT}, lines)
    assert_moves(backward, {"grad_output": IN, "grad_input": OUT}, lines)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@DTYPES
def test_hidden_layer(dtype: torch.dtype, gated: bool, calls: list[Call]):
    names = {"input": (64, 8), "w_up": (512, 8), "b_up": (512,), "w_down": (8, 512)} | (
        {"w_gate": (512, 8)} if gated else {}
    )
    leaves = [torch.randn(shape).to(dtype) for shape in names.values()]
    run(lambda *t: functional.ffn(**dict(zip(names, t, strict=True)), activation="silu", dropout_p=0.1), *leaves)
    forward, backward = calls
    gate = {"gate": IN} if gated else {}
    assert_moves(forward, {"up": IN, "hidden": OUT} | gate)
    turned = {"grad_hidden": (1, 1)} | ({"grad_gate": OUT} if gated else {})  # which grad_up takes the place of
    assert_moves(backward, {"up": IN, "hidden": OUT} | turned | gate)


@DTYPES
def test_embedding(dtype: torch.dtype, calls: list[Call]):
    ids, columns, each = 16, 1024, 4
    tokens = torch.arange(ids * each) % ids
    run(lambda table: functional.embedding(tokens, table), torch.randn(ids, columns).to(dtype))
    forward, backward = calls
    assert_moves(forward, {"weight": (each, 0), "output": OUT})  # rows that come again: from the cache
    assert_moves(backward, {"grad_output": IN, "grad_weight": OUT})  # runs end with chunks: nothing is joined


def test_runs_that_are_joined_move_an_eighth_more(calls: list[Call]):
    run(lambda table: functional.embedding(torch.zeros(64, dtype=torch.long), table), torch.randn(1, 1024))
    partial = calls[1].moved["partial"]
    assert 0 < partial[1] == partial[3] <= 64 * 1024 * 4 / 8
    assert calls[1].times("grad_output") == IN and calls[1].times("grad_weight") == OUT


# ---- lists of tensors ------------------------------------------------------------------------------------------------


# Bytes an element, all lists together: csrc/cuda/adamw.cu.
@pytest.mark.parametrize(
    "dtype, options, bytes_moved",
    [(F32, {}, 28), (BF16, {"master_weights": True}, 28), (BF16, {"stochastic_rounding": True}, 14)],
    ids=["float32", "bfloat16 with masters", "bfloat16"],
)
def test_adamw(dtype: torch.dtype, options: dict, bytes_moved: int, calls: list[Call]):
    sizes = (4096, 1024)
    weights = [nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    optimizer = AdamW(weights, 0.1, **options)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    with llmengine.backend("cuda_sim"):
        optimizer.step()
    (call,) = calls
    lists = {"parameters", "gradients", "exp_avgs", "exp_avg_sqs", "masters"} & call.moved.keys()
    assert sum(call.moved[name][1] + call.moved[name][3] for name in lists) == bytes_moved * sum(sizes)
    for name in lists:
        assert all(times <= 1 for times in call.times(name)), name
        beside_wider = "master_weights" in options and call.tensors[name][0].dtype == dtype
        assert call.narrowest(name) == (8 if beside_wider else 16), name
    assert all(call.size(name) <= 256 for name in call.moved.keys() - lists)


@DTYPES
def test_norm_of_gradients(dtype: torch.dtype, calls: list[Call]):
    with llmengine.backend("cuda_sim"):
        gradient_norm([torch.randn(shape).to(dtype) for shape in ((64, 256), (128,), (20_000,))])
    assert_moves(calls[0], {"gradients": IN})


# ---- one line broken -------------------------------------------------------------------------------------------------

MEAN = "row_reduce<Sum>(total, slots, turn);\n      mean = total[0] / columns;\n      for"
BREAKS: dict[str, Break] = {
    "a third read": (
        "norm", "norm.cu", f"    if (p.subtract_mean) {{\n      {MEAN}", f"    {{\n      {MEAN}",
        "norm_forward: input, .* not as often as it should be",
    ),
    "element by element": (
        "norm", "row.cuh", "0, has_aligned_rows(t)};", "0, false};",
        "norm_forward: input, moved in 4 bytes at a time: too few",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_caught(name: str, calls: list[Call], tmp_path: Path, monkeypatch):
    def attempt() -> None:
        run(lambda x: functional.rms_norm(x, (16_400,)), *rows_of(16_400, F32))
        assert_moves(calls[-2], {"input": (2, 0), "output": OUT})

    attempt()
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
