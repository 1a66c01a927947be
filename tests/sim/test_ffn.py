"""The feed-forward block with products of our own (csrc/cuda/ffn_products.cu, ffn_sm80.cu, ffn_sm90a.cu) in the
simulator: what the laws of tests/test_ops.py leave out, which try layouts in float32, and kernels with a line broken.
Its elementwise kernels, beside cuBLAS: test_kernels.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.cuda.native import PRODUCTS, Native, products_by
from llmengine.testing import LAYOUTS, Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples import ffn
from llmengine.testing.simulator import SCHEDULES

from .harness import Break, assert_caught, device_of, places_of_products, schedule

HEAVY = (pytest.mark.heavy,)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


def sample_of(tokens: int, d: int, f: int, *, gated: bool = False, biases: bool = True, **options) -> Sample:
    g = torch.Generator().manual_seed(tokens + d + f)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    kwargs: dict = {k: v for k, v in options.items() if k != "residual"}
    if biases:
        kwargs |= {"b_up": randn(f), "b_down": randn(d)} | ({"b_gate": randn(f)} if gated else {})
    if options.pop("residual", False):
        kwargs["residual"] = randn(tokens, d)
    if gated:
        kwargs["w_gate"] = randn(f, d, scale=2 * d**-0.5)
    tensors = (randn(tokens, d), randn(f, d, scale=2 * d**-0.5), randn(d, f, scale=f**-0.5))
    return Sample(f"{tokens} x {d} x {f} gated={gated} {options}", tensors, kwargs)


def assert_right(sample: Sample, dtype: torch.dtype, backend: str = "cuda_sim", core: str = "sm80") -> None:
    given = sample.on(device_of(backend)).rounded(dtype)
    oracle = evaluate(functional.ffn, given.rounded(torch.float64), "reference")
    plain = evaluate(ffn.plain, given, None)
    with poison(), products_by(core):
        ours = evaluate(functional.ffn, given, backend)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name} {dtype}: output")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name} {dtype}: grad {key}")


# A tile of tokens and one more; of hidden units (64 where there is a gate) and one more; of features; several tiles.
# The last two TMA can fetch whole: more than a cluster's tile, with and without a gate.
SIZES = [(128, 32, 128), (129, 40, 65), (64, 129, 64), (3, 24, 200), (257, 16, 129), (130, 72, 136), (260, 72, 264)]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens, d, f", SIZES)
@pytest.mark.parametrize("backend, core", places_of_products())
def test_edges_of_tiles(tokens: int, d: int, f: int, gated: bool, backend: str, core: str):
    for dtype, activation, p in zip(HALVES, ("gelu", "silu"), (0.2, 0.0), strict=True):
        options = {"activation": activation, "dropout_p": p, "residual": gated == (p > 0)}
        assert_right(sample_of(tokens, d, f, gated=gated, **options), dtype, backend, core)


# Several tiles for each of a device's multiprocessors; see test_linear.py.
FULL = {"cuda_sim": (520, 16, 136), "cuda": (9000, 264, 4104)}


@pytest.mark.parametrize("backend, core", places_of_products())
def test_a_full_device(backend: str, core: str):
    sample = sample_of(*FULL[backend], gated=True, activation="silu", dropout_p=0.2, residual=True)
    assert_right(sample, torch.bfloat16, backend, core)


@pytest.mark.parametrize("activation", sorted(ffn.ACTIVATIONS))
@pytest.mark.parametrize("core", ["sm80", "sm90a"])
def test_every_activation(core: str, activation: str):
    for gated in (False, True):
        assert_right(sample_of(40, 24, 72, gated=gated, activation=activation), HALVES[gated], core=core)


def equal(ours, other) -> bool:
    mine, its = ([*outputs, *gradients.values()] for outputs, gradients in (ours, other))
    return all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def close(ours, other) -> bool:
    mine, its = ([*outputs, *gradients.values()] for outputs, gradients in (ours, other))
    return all(torch.allclose(a, b, rtol=2**-6, atol=2**-6 * b.abs().max()) for a, b in zip(mine, its, strict=True))


# With at most 8 rows each, so that "huge stride" holds for every matrix, and with more.
@pytest.mark.parametrize("tokens, d, f", [(7, 8, 5), (19, 24, 40)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_every_layout_is_right(core: str, layout: str, tokens: int, d: int, f: int):
    """In the bits of any other, where one core multiplies all; what TMA cannot fetch the other one does."""
    sample = sample_of(tokens, d, f, gated=True, dropout_p=0.3, residual=True)
    expected = evaluate(functional.ffn, sample.rounded(torch.bfloat16), "cuda_sim")
    for key in sample.tensors():
        moved = sample.rounded(torch.bfloat16, LAYOUTS[layout], key)
        found = evaluate(functional.ffn, moved, "cuda_sim")
        assert equal(found, expected) if core == "sm80" else close(found, expected), key


def test_a_gate_that_lies_otherwise_than_its_partner():
    """Of one feature, contiguous, and beside another: k then has a stride of 1 or of 2."""
    sample = sample_of(19, 1, 40, gated=True)
    expected = evaluate(functional.ffn, sample.rounded(torch.bfloat16), "cuda_sim")
    for key in (1, "w_gate"):
        apart = sample.rounded(torch.bfloat16, lambda w: torch.cat([w, w], 1)[:, :1], key)
        assert equal(evaluate(functional.ffn, apart, "cuda_sim"), expected), key


def test_expanded_gradients(core: str):
    given = sample_of(19, 24, 40).rounded(torch.bfloat16)
    expanded = evaluate(functional.ffn, given, "cuda_sim", lambda o: o.new_ones(()).expand(o.shape))
    assert equal(expanded, evaluate(functional.ffn, given, "cuda_sim", torch.ones_like))


def test_gradients_appear_only_where_asked(core: str):
    given = sample_of(19, 24, 40, gated=True).rounded(torch.float16)
    everything = evaluate(functional.ffn, given, "cuda_sim")[1]
    for wanted in everything:
        others = tuple(k for k in everything if k != wanted)
        alone = Sample(given.name, given.args, given.kwargs, others)
        with poison():
            assert torch.equal(evaluate(functional.ffn, alone, "cuda_sim")[1][wanted], everything[wanted]), wanted


def test_without_w_downs_gradient_no_hidden_layer_is_made_again(core: str, monkeypatch):
    given, call = sample_of(19, 24, 40, gated=True).rounded(torch.bfloat16), Native.call
    hidden = []

    def seen(self, kernel: str, on: Tensor, **arguments) -> None:
        hidden.append(arguments["hidden"])
        call(self, kernel, on, **arguments)

    monkeypatch.setattr(Native, "call", seen)
    frozen = Sample(given.name, given.args, given.kwargs, (2,))  # w_down, as beside adapters
    evaluate(functional.ffn, frozen, "cuda_sim")
    assert [x is None for x in hidden] == [False, True]  # forward, backward


def test_gradients_of_float32_weights_are_not_rounded(core: str):
    given = sample_of(40, 24, 40, gated=True).rounded(torch.bfloat16)
    wide = Sample(given.name, (given.args[0], *(w.float() for w in given.args[1:])), given.kwargs)
    narrow, kept = (evaluate(functional.ffn, s, "cuda_sim")[1] for s in (given, wide))
    for key in (1, 2):
        assert kept[key].dtype == torch.float32 and torch.equal(kept[key].bfloat16(), narrow[key])
        assert not torch.equal(kept[key], narrow[key].float())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_equal_bits_under_every_schedule(core: str, gated: bool):
    from llmengine import _cuda_sim

    given = sample_of(130, 40, 72, gated=gated, dropout_p=0.1).rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        results.append(evaluate(functional.ffn, given, "cuda_sim"))
    assert all(equal(results[0], other) for other in results[1:])


def test_who_multiplies_is_told_by_a_variable(monkeypatch):
    given = sample_of(19, 24, 40).rounded(torch.bfloat16)
    sm80 = evaluate(functional.ffn, given, "cuda_sim")
    found = {}
    for maker in ("sm80", "sm90a", "own", "blas"):
        monkeypatch.setenv(PRODUCTS, maker)
        found[maker] = evaluate(functional.ffn, given, "cuda_sim")
    assert equal(found["sm80"], sm80) and equal(found["own"], found["sm90a"])
    assert not equal(found["blas"], sm80)  # which rounds the pre-activations before the activation
    monkeypatch.setenv(PRODUCTS, "mine")
    with (
        pytest.raises(ValueError, match=f"{PRODUCTS}: 'mine' is not one of blas, own, sm80, sm90a"),
        llmengine.backend("cuda_sim"),
    ):
        functional.ffn(*given.args)


def test_few_tokens_and_a_deep_k_are_multiplied_in_parts(core: str):
    """Of w_down's gradient and, forward, of the hidden layer's product with w_down."""
    from llmengine import _cuda_sim

    _cuda_sim.set_multiprocessors(count=8)
    try:
        assert_right(sample_of(20, 16, 1200, residual=True), torch.bfloat16, core=core)
        assert_right(sample_of(1100, 16, 24), torch.bfloat16, core=core)
    finally:
        _cuda_sim.set_multiprocessors(count=3)


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt(core: str) -> None:
    assert_right(sample_of(133, 40, 136, activation="gelu", dropout_p=0.3), HALVES[0], core=core)
    assert_right(
        sample_of(70, 24, 136, gated=True, activation="silu", dropout_p=0.2, residual=True), HALVES[1], core=core
    )
    assert_right(sample_of(70, 24, 40, biases=False, activation="relu"), HALVES[0], core=core)
    if core == "sm80":
        assert_right(sample_of(70, 24, 135, gated=True, activation="silu", dropout_p=0.2), HALVES[1])
        return assert_right(sample_of(133, 40, 135, activation="gelu"), HALVES[0])
    assert_right(sample_of(260, 24, 264, gated=True, activation="gelu_tanh"), HALVES[1], core=core)


KERNEL, CORE, ENDS = ("ffn_sm80", "ffn_sm80.cu"), ("ffn_sm80", "gemm_sm80.cuh"), ("ffn_sm80", "ffn_products.cuh")
HOPPER, HOPPER_CORE = ("ffn_sm90a", "ffn_sm90a.cu"), ("ffn_sm90a", "gemm_sm90a.cuh")
BREAKS: dict[str, Break] = {
    "up and gate change places": (*CORE, "n % 2 == 0 ? left : right", "n % 2 == 1 ? left : right", "exceeds"),
    "units of another warp": (*CORE, "first / 2 + n / 2 * 32", "first / 2 + n % 2 * 32", "exceeds"),
    "lines of a pair past the last": (
        *CORE, "from.lines - line);", "32);", "past the end of w_|across its end|in no tensor",
    ),
    "columns of the other side": (*CORE, "vector + side * kVectors", "vector + side", "exceeds"),
    "the bias after the activation": (*ENDS, "add_line<T>(p.b_gate, column, p.columns, x[1]);", "", "exceeds"),
    "up is activated": (
        *ENDS, "value_of<activation>(x[sides - 1][i]) * x[0][i] :", "x[sides - 1][i] * x[0][i] :", "exceeds",
    ),
    "dropout of the tile's rows": (
        *KERNEL, "finish_hidden(p.to, seed, row + r,", "finish_hidden(p.to, seed, r,", "races|exceeds",
    ),
    "no dropout backward": (*ENDS, "drop(p.dropout, seed, row, column, keep);", "{}", "exceeds"),
    "tokens past the last": (
        *ENDS, "if (row >= p.tokens) return;\n  float grad_gate", "float grad_gate", "past the end",
    ),
    "the slope of up": (*ENDS, "unpack<T>(gated ? x.gate : x.up, value);", "unpack<T>(x.up, value);", "exceeds"),
    "sums of the wrong side": (*ENDS, "sum_gate[i] += grad_gate[i];", "sum_gate[i] += grad[i];", "exceeds"),
    "sums of one warp's rows": (*KERNEL, "(tile.row) + warp_of() / 2;", "(tile.row);", "races"),
    "sums of every other row": (*CORE, "lanes = 8; lanes < 32", "lanes = 16; lanes < 32", "exceeds"),
    "columns of sums": (*CORE, "warp_column() + lane_of() * 8, columns", "lane_of() * 8, columns", "races"),
    "the gate's share of the input": (
        "ffn_products", "ffn_products.cu", "product.a2 = p.grad_gate, product.b2 = p.w_gate;", "{}", "exceeds",
    ),
    "no residual": ("ffn_products", "ffn_products.cu", ", down.added = p.residual;", ";", "exceeds"),
    "sides of a pair change places": (*HOPPER_CORE, "pair ? block : product", "pair ? 1 - block : product", "exceeds"),
    "lines of a pair": (*HOPPER_CORE, "pair ? column * kShare", "pair ? column * columns", "exceeds"),
    "a side's part of a panel": (*HOPPER_CORE, "side * (count / sides) + first", "side * 4 + first", "exceeds"),
    "units of the pair's tile": (*HOPPER, "place.column / sides + v, x", "place.column + v, x", "exceeds|NaN|nan"),
    "tokens of the cluster": (
        *HOPPER, "place.row + r, place.column / sides", "r, place.column / sides", "races|exceeds",
    ),
    "pre-activations of other rows": (*HOPPER, "(to, place.row + r, place.column + v);", "(to, r, v);", "exceeds"),
    "lines of sums past the last": (*HOPPER, "line < to.lines ? to.columns : 0", "to.columns", "past the end"),
    "sums of the warpgroup's first warp": (*HOPPER_CORE, "w < 4; ++w) sums", "w < 1; ++w) sums", "exceeds"),
    "sums are read too soon": (*HOPPER_CORE, "  ptx::barrier_sync(group, 128);\n  if (warp == 0 && lane < 8)",
                               "  if (warp == 0 && lane < 8)", "races|no thread"),
    "sums are written over too soon": (
        *HOPPER_CORE, "  ptx::barrier_sync(group, 128);  // the panels may be", "  // the panels may be", "races",
    ),
    "sums go on": (*HOPPER_CORE, "  for (int i = 0; i < 8; ++i) sums[i] = 0.0f;", "  for (;;) break;", "exceeds"),
}  # fmt: skip


@pytest.mark.parametrize("core", ["sm80", "sm90a"])
def test_whole_kernels_pass_what_broken_ones_must_fail(core: str):
    attempt(core)


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 3 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    core = "sm90a" if "sm90a" in BREAKS[name][0] else "sm80"
    assert_caught(BREAKS[name], lambda: attempt(core), tmp_path, monkeypatch)
