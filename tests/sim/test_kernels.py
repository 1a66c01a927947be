"""The engine's own CUDA kernels in the simulator: widths and places that the samples of tests/test_ops.py leave out,
equal bits under every schedule, and kernels with one line broken, each of which must fail.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.cuda.native import PRODUCTS
from llmengine.testing.samples import ffn

from .harness import DTYPES, assert_caught, check

# ---- cross-entropy ---------------------------------------------------------------------------------------------------

EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}


def logits_and_labels(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(classes)
    target = torch.randint(classes, (rows,), generator=g)
    target[1] = -100
    return (3 * torch.randn(rows, classes, generator=g)).to(dtype), target, torch.rand(classes, generator=g)


# One warp, some, and all; fewer than a vector; whole vectors and not, so that rows begin anywhere.
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("classes", [5, 24, 515, 3000, 18001])
@DTYPES
def test_cross_entropy_of_every_width(native, dtype: torch.dtype, classes: int, options: dict):
    x, target, weight = logits_and_labels(5, classes, dtype)
    x[2, 1:-1] = -torch.inf if not options else 0.0
    if not options:
        target[2] = 0

    def loss(x):
        return functional.cross_entropy(x, target, weight.to(x) if options else None, **options)

    check(loss, [x], native)


@DTYPES
def test_cross_entropy_where_logits_and_gradient_lie_differently(native, dtype: torch.dtype):
    """Rows of a slice begin 2 or 4 bytes past those of the gradient: no vector fits both."""
    x, target, _ = logits_and_labels(4, 601, dtype)
    check(lambda x: functional.cross_entropy(x[:, 1:], target % 600, ignore_index=-1), [x], native)


def test_the_losses_of_many_rows_are_added_up(native):
    x, target, weight = logits_and_labels(5002, 3, torch.float32)
    check(lambda x: functional.cross_entropy(x, target, weight.to(x)), [x], native, ("random",))


def test_a_target_that_is_no_class_makes_its_row_nan(native):
    x = torch.randn(4, 10, requires_grad=True)
    with llmengine.backend("cuda_sim"):
        losses = functional.cross_entropy(x, torch.tensor([0, 10, -1, -100]), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(1).tolist() == gradient.isnan().all(1).tolist() == losses.isnan().tolist()
    assert not gradient[3].any()


@pytest.mark.parametrize("classes", [5, 300, 601])
@DTYPES
def test_the_gradient_of_cross_entropy_may_take_the_place_of_the_logits(native, dtype: torch.dtype, classes: int):
    x, target, _ = logits_and_labels(4, classes, dtype)
    given = {
        "target": target, "weight": None, "weight_sum": None, "reduction": "sum", "ignore_index": -100,
        "label_smoothing": 0.1, "z_loss": 0.0, "softcap": 0.0, "normaliser": torch.ones(()), "stream": 0,
        "lse": x.float().logsumexp(1), "grad_loss": torch.ones(()),
    }  # fmt: skip
    apart = torch.empty_like(x)
    native.cross_entropy_backward(**given, input=x, grad_input=apart)
    native.cross_entropy_backward(**given, input=x, grad_input=x)
    assert torch.equal(x, apart)


# ---- rotary embedding ------------------------------------------------------------------------------------------------


# More heads, and more places in a head, than a block has threads for; heads that begin anywhere.
@pytest.mark.parametrize("shape, turned", [((2, 3, 300, 2), 2), ((3, 2, 2100), 2096), ((2, 5, 3, 16), 6)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@DTYPES
def test_rotary_embedding_of_every_size(native, dtype: torch.dtype, interleaved: bool, shape: tuple, turned: int):
    g = torch.Generator().manual_seed(1)
    angles = 6 * torch.rand(shape[-3], turned // 2, generator=g, dtype=torch.float64)

    def turn(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return functional.rotary_embedding(x, angles.cos().to(wide), angles.sin().to(wide), interleaved=interleaved)

    check(turn, [torch.randn(shape, generator=g).to(dtype)], native, ("forward", "random"))


# ---- feed-forward block ----------------------------------------------------------------------------------------------


def block(tokens: int, f: int, dtype: torch.dtype, gated: bool) -> tuple[list[Tensor], list[str]]:
    """Tensors of a block of two features, so that nearly all of it is the hidden layer, and their names."""
    g = torch.Generator().manual_seed(f)
    shapes = {"input": (tokens, 2), "w_up": (f, 2), "w_down": (2, f), "b_up": (f,)}
    shapes |= {"w_gate": (f, 2), "b_gate": (f,)} if gated else {}
    return [torch.randn(s, generator=g).to(dtype) for s in shapes.values()], list(shapes)


# Fewer than a line of vectors and more; rows in the middle of a block; no whole vectors.
@pytest.mark.parametrize("tokens, f", [(3, 24), (19, 515), (33, 264)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@DTYPES
def test_hidden_layers_of_every_size(native, dtype: torch.dtype, gated: bool, tokens: int, f: int, monkeypatch):
    monkeypatch.setenv(PRODUCTS, "blas")  # own products of 16-bit floats: test_ffn.py
    leaves, names = block(tokens, f, dtype, gated)
    for activation, dropout_p in zip(ffn.ACTIVATIONS, (0.2, 0.0, 0.0, 0.1, 0.3), strict=True):

        def call(function, *given, options={"activation": activation, "dropout_p": dropout_p}):  # noqa: B006
            return function(**dict(zip(names, given, strict=True)), **options)

        of_torch = functools.partial(call, ffn.plain)
        check(functools.partial(call, functional.ffn), leaves, native, ("forward", "random"), of_torch)


@pytest.mark.parametrize("activation", sorted(ffn.ACTIVATIONS))
def test_activations_over_the_whole_line(native, activation: str):
    """Through unit weights: far tails, what overflows on the way, infinity and NaN; value and slope."""
    x = torch.cat([torch.linspace(-40, 40, 2001), torch.tensor([1e4, -1e4, 1e30, -1e30, torch.inf, torch.nan])])
    x, one = x[:, None].requires_grad_(), torch.ones(1, 1)
    expected = ffn.ACTIVATIONS[activation](x.double())
    (slopes,) = torch.autograd.grad(expected.sum(), x)
    with llmengine.backend("cuda_sim"):
        ours = functional.ffn(x, one, one, activation=activation)
        (gradient,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
    finite = x.detach().abs() < 1e30  # at infinity autograd's formulas give NaN where ours keep the limit
    torch.testing.assert_close(gradient[finite], slopes[finite], rtol=1e-6, atol=1e-6)
    steepest = 2e30 if activation == "relu_squared" else 1
    assert gradient[-4] == steepest and gradient[-3] == 0 and gradient[-1].isnan() == (activation != "relu")


# ---- one line broken -------------------------------------------------------------------------------------------------

# (kernel file, file to break, line, what it becomes, what must be said): a wrong result, or what the simulator found.
BREAKS = {
    "no rescaling": ("cross_entropy", "cross_entropy.cu", "total *= exp_of(largest - most);", "", "exceeds"),
    "each thread its own maximum": (
        "cross_entropy", "cross_entropy.cu", "row_reduce<Max>(largest, maxima, turn_of_maxima);", "", "exceeds",
    ),
    "a vector too many": (
        "cross_entropy", "cross_entropy.cu", "if (vector < parts.vectors)", "if (vector <= parts.vectors)",
        "reads 16 bytes at byte .* of input .*, across its end",
    ),
    "the classes up to the target": ("cross_entropy", "token_loss.cuh", "i == place ?", "i <= place ?", "exceeds"),
    "ignored labels are counted": (
        "cross_entropy", "cross_entropy.cu", "if (label != o.ignore_index) sums", "sums", "exceeds",
    ),
    "losses past the last": (
        "cross_entropy", "cross_entropy.cu", "rows - first < 4 ? static_cast<int>(rows - first) : 4", "4",
        "cross_entropy_sum: .* of losses .*, across its end",
    ),
    "the head of a row": (
        "cross_entropy", "row.cuh", "head = past ? n - past : 0", "head = past",
        "reads 16 bytes .* not a multiple of 16",
    ),
    "the tail of a row": (
        "cross_entropy", "row.cuh", "columns - singles() + single;", "single;", "races: .* of grad_input",
    ),
    "rows that lie differently": (
        "cross_entropy", "row.cuh", "apart % 16 == 0 ?", "true ?", "writes 16 bytes .* not a multiple of 16",
    ),
    "a head too many": ("rotary", "rotary.cu", "head < p.heads;", "head <= p.heads;", "races: .* of output"),
    "the backward turns forward": ("rotary", "rotary.cu", "sin[k] *= p.sign", "sin[k] *= 1.0f", "exceeds"),
    "angles of another sequence": (
        "rotary", "rotary.cu", "p.cos + place * p.pairs", "p.cos + token * p.pairs", "past the end of cos",
    ),
    "the rest is taken for aligned": (
        "rotary", "rotary.cu", "p.whole(p.from_aligned, turned)", "p.from_aligned", "not a multiple of 16",
    ),
    "a row past the last": ("ffn", "ffn.cu", "if (row >= p.rows) continue;", "", "past the end of up"),
    "lines of a hidden layer": ("ffn", "ffn.cu", "blockIdx.y * 32", "blockIdx.y * 31", "races: .* of hidden"),
    "the gate is not activated": (
        "ffn", "ffn.cu", "value_of<activation>(h[i]) * u[i]", "h[i] * value_of<activation>(u[i])", "exceeds",
    ),
    "dropout of another row": ("ffn", "ffn.cu", "seed, row, column, keep", "seed, row + 1, column, keep", "exceeds"),
    "each thread its own largest logit": (
        "softmax", "softmax.cu", "row_reduce<Max>(largest, slots, turn);", "", "exceeds",
    ),
    "no rescaling of a thread's sum": ("softmax", "softmax.cu", "total[0] *= expf(largest - shift);", "", "exceeds"),
    "no sum in the gradient": ("softmax", "softmax.cu", "(g[i] - total) * y[i]", "g[i] * y[i]", "exceeds"),
    "logits of a row too many": ("softmax", "softmax.cu", "row < p.rows;", "row <= p.rows;", "past the end of input"),
    "squares past the row": ("norm", "norm.cu", "i < valid ? h[i] - mean : 0.0f", "h[i] - mean", "exceeds"),
    "statistics of the first row": ("norm", "norm.cu", "p.rstd[row]};", "p.rstd[0]};", "exceeds"),
    "every thread's statistics": ("norm", "norm.cu", "if (threadIdx.x != 0) return;", "", "races: writes .* of mean"),
    "no barrier between warps": (
        "norm", "norm.cu", "    __syncthreads();\n    if (group > 0) return;", "    if (group > 0) return;",
        "reads shared memory that no thread|races: .* shared others",
    ),
    "one warp's sums left out": ("norm", "norm.cu", "other < kNarrowRows - 1", "other < kNarrowRows - 2", "exceeds"),
    "tokens of a block": ("rotary", "rotary.cu", "* blockDim.z + threadIdx.z;", "* blockDim.z;", "races: .* of output"),
}  # fmt: skip


def try_cross_entropy() -> None:
    for classes, options in ((33, {}), (1401, EVERYTHING)):
        x, target, weight = logits_and_labels(5, classes, torch.float32)
        x[:, -1] = 9.0  # the largest comes last
        check(lambda x: functional.cross_entropy(x, target, weight.to(x), **options), [x], schedules=("random",))  # noqa: B023
    check(lambda x: functional.cross_entropy(x[:, 1:], target, ignore_index=-100), [x], schedules=("random",))


def try_rotary() -> None:
    g = torch.Generator().manual_seed(1)
    for turned in (16, 6):
        angles = 6 * torch.rand(5, turned // 2, generator=g, dtype=torch.float64)

        def turn(x, angles=angles):
            wide = torch.promote_types(x.dtype, torch.float32)
            return functional.rotary_embedding(x, angles.cos().to(wide), angles.sin().to(wide))

        check(turn, [torch.randn(2, 5, 3, 16, generator=g)], schedules=("random",))


def try_ffn() -> None:
    leaves, names = block(19, 260, torch.float32, gated=True)
    check(lambda *t: functional.ffn(**dict(zip(names, t, strict=True)), dropout_p=0.3), leaves, schedules=("random",))


def try_softmax() -> None:
    for columns in (33, 16_400):
        x = 3 * torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
        x[:, -1] = 12.0  # the largest comes last
        check(lambda x: functional.softmax(x, -1), [x], schedules=("random",))


def try_norm() -> None:
    g = torch.Generator().manual_seed(1)
    x, weight, bias = (1 + torch.randn(*shape, generator=g) for shape in ((9, 35), (35,), (35,)))
    x *= torch.arange(1, 10)[:, None]
    check(lambda x, w, b: functional.layer_norm(x, (35,), w, b), [x, weight, bias], schedules=("random",))


TRIES = {
    "softmax": try_softmax, "norm": try_norm, "cross_entropy": try_cross_entropy, "rotary": try_rotary, "ffn": try_ffn,
}  # fmt: skip


@pytest.mark.parametrize("source", TRIES)
def test_whole_kernels_pass_what_broken_ones_must_fail(native, source: str):
    TRIES[source]()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch):
    assert_caught(BREAKS[name], TRIES[BREAKS[name][0]], tmp_path, monkeypatch)
