"""The feed-forward block with products of our own (csrc/cuda/ffn_sm80.cu) in the simulator: what the laws of
tests/test_ops.py leave out, which try layouts in float32, and kernels with one line broken. Its elementwise kernels,
beside cuBLAS: test_kernels.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.cuda.native import PRODUCTS, products_by
from llmengine.ops import registry
from llmengine.testing import LAYOUTS, Sample, assert_law, evaluate, poison, simulator
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples import ffn
from llmengine.testing.simulator import SCHEDULES

from .harness import Break, assert_caught

HEAVY = (pytest.mark.heavy,)
HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ("cuda_sim", *(["cuda"] if registry.load("cuda").unavailable is None else []))


@pytest.fixture(autouse=True)
def scheduled(request):
    simulator.prepare(request.node.name)


def sample_of(tokens: int, d: int, f: int, *, gated: bool = False, biases: bool = True, **options) -> Sample:
    g = torch.Generator().manual_seed(tokens + d + f)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    kwargs: dict = dict(options)
    if biases:
        kwargs |= {"b_up": randn(f), "b_down": randn(d)} | ({"b_gate": randn(f)} if gated else {})
    if gated:
        kwargs["w_gate"] = randn(f, d, scale=2 * d**-0.5)
    tensors = (randn(tokens, d), randn(f, d, scale=2 * d**-0.5), randn(d, f, scale=f**-0.5))
    return Sample(f"{tokens} x {d} x {f} gated={gated} {options}", tensors, kwargs)


def assert_right(sample: Sample, dtype: torch.dtype, backend: str = "cuda_sim") -> None:
    given = sample.on("cuda" if backend == "cuda" else "cpu").rounded(dtype)
    oracle = evaluate(functional.ffn, given.rounded(torch.float64), "reference")
    plain = evaluate(ffn.plain, given, None)
    with poison(), products_by("own"):
        ours = evaluate(functional.ffn, given, backend)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name} {dtype}: output")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name} {dtype}: grad {key}")


# A tile of tokens and one more; of hidden units (64 where there is a gate) and one more; of features; several tiles.
SIZES = [(128, 32, 128), (129, 40, 65), (64, 129, 64), (3, 24, 200), (257, 16, 129)]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens, d, f", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_of_tiles(tokens: int, d: int, f: int, gated: bool, backend: str):
    for dtype, activation, p in zip(HALVES, ("gelu", "silu"), (0.2, 0.0), strict=True):
        assert_right(sample_of(tokens, d, f, gated=gated, activation=activation, dropout_p=p), dtype, backend)


def equal(ours, other) -> bool:
    mine, its = ([*outputs, *gradients.values()] for outputs, gradients in (ours, other))
    return all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


# With at most 8 rows each, so that "huge stride" holds for every matrix, and with more.
@pytest.mark.parametrize("tokens, d, f", [(7, 8, 5), (19, 24, 40)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_every_layout_gives_equal_bits(layout: str, tokens: int, d: int, f: int):
    sample = sample_of(tokens, d, f, gated=True, dropout_p=0.3)
    expected = evaluate(functional.ffn, sample.rounded(torch.bfloat16), "cuda_sim")
    for key in sample.tensors():
        moved = sample.rounded(torch.bfloat16, LAYOUTS[layout], key)
        assert equal(evaluate(functional.ffn, moved, "cuda_sim"), expected), key


def test_a_gate_that_lies_otherwise_than_its_partner():
    """Of one feature, contiguous, and beside another: k then has a stride of 1 or of 2."""
    sample = sample_of(19, 1, 40, gated=True)
    expected = evaluate(functional.ffn, sample.rounded(torch.bfloat16), "cuda_sim")
    for key in (1, "w_gate"):
        apart = sample.rounded(torch.bfloat16, lambda w: torch.cat([w, w], 1)[:, :1], key)
        assert equal(evaluate(functional.ffn, apart, "cuda_sim"), expected), key


def test_expanded_gradients():
    given = sample_of(19, 24, 40).rounded(torch.bfloat16)
    expanded = evaluate(functional.ffn, given, "cuda_sim", lambda o: o.new_ones(()).expand(o.shape))
    assert equal(expanded, evaluate(functional.ffn, given, "cuda_sim", torch.ones_like))


def test_gradients_appear_only_where_asked():
    given = sample_of(19, 24, 40, gated=True).rounded(torch.float16)
    everything = evaluate(functional.ffn, given, "cuda_sim")[1]
    for wanted in everything:
        others = tuple(k for k in everything if k != wanted)
        alone = Sample(given.name, given.args, given.kwargs, others)
        with poison():
            assert torch.equal(evaluate(functional.ffn, alone, "cuda_sim")[1][wanted], everything[wanted]), wanted


def test_gradients_of_float32_weights_are_not_rounded():
    given = sample_of(40, 24, 33, gated=True).rounded(torch.bfloat16)
    wide = Sample(given.name, (given.args[0], *(w.float() for w in given.args[1:])), given.kwargs)
    narrow, kept = (evaluate(functional.ffn, s, "cuda_sim")[1] for s in (given, wide))
    for key in (1, 2):
        assert kept[key].dtype == torch.float32 and torch.equal(kept[key].bfloat16(), narrow[key])
        assert not torch.equal(kept[key], narrow[key].float())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_equal_bits_under_every_schedule(gated: bool):
    from llmengine import _cuda_sim

    given = sample_of(130, 40, 70, gated=gated, dropout_p=0.1).rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        results.append(evaluate(functional.ffn, given, "cuda_sim"))
    assert all(equal(results[0], other) for other in results[1:])


def test_who_multiplies_is_told_by_a_variable(monkeypatch):
    given = sample_of(19, 24, 40).rounded(torch.bfloat16)
    own = evaluate(functional.ffn, given, "cuda_sim")
    monkeypatch.setenv(PRODUCTS, "own")
    assert equal(evaluate(functional.ffn, given, "cuda_sim"), own)
    monkeypatch.setenv(PRODUCTS, "blas")  # which rounds the pre-activations before the activation
    assert not equal(evaluate(functional.ffn, given, "cuda_sim"), own)
    monkeypatch.setenv(PRODUCTS, "mine")
    with pytest.raises(ValueError, match=f"{PRODUCTS}: 'mine' is not one of blas, own"), llmengine.backend("cuda_sim"):
        functional.ffn(*given.args)


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt() -> None:
    assert_right(sample_of(133, 40, 135, activation="gelu", dropout_p=0.3), HALVES[0])
    assert_right(sample_of(70, 24, 135, gated=True, activation="silu", dropout_p=0.2), HALVES[1])
    assert_right(sample_of(70, 24, 40, biases=False, activation="relu"), HALVES[0])


KERNEL, CORE = ("ffn_sm80", "ffn_sm80.cu"), ("ffn_sm80", "gemm_sm80.cuh")
BREAKS: dict[str, Break] = {
    "up and gate change places": (*CORE, "n % 2 == 0 ? left : right", "n % 2 == 1 ? left : right", "exceeds"),
    "units of another warp": (*CORE, "first / 2 + n / 2 * 32", "first / 2 + n % 2 * 32", "exceeds"),
    "lines of a pair past the last": (
        *CORE, "from.lines - line);", "32);", "past the end of w_|across its end|in no tensor",
    ),
    "columns of the other side": (*CORE, "vector + side * kVectors", "vector + side", "exceeds"),
    "the bias after the activation": (*KERNEL, "add_line<T>(p.b_gate, column, p.columns, x[1]);", "", "exceeds"),
    "up is activated": (
        *KERNEL, "value_of<activation>(x[sides - 1][i]) * x[0][i] :", "x[sides - 1][i] * x[0][i] :", "exceeds",
    ),
    "dropout of the tile's rows": (
        *KERNEL, "finish_hidden(p, seed, row + r,", "finish_hidden(p, seed, r,", "races|exceeds",
    ),
    "no dropout backward": (*KERNEL, "drop(p.dropout, seed, row, column, keep);", "{}", "exceeds"),
    "tokens past the last": (*KERNEL, "if (row + r >= p.grad_output.lines) return;", "", "past the end"),
    "the slope of up": (*KERNEL, "(gated ? grad_gate[i] : up[i])", "(up[i])", "exceeds"),
    "sums of the wrong side": (*KERNEL, "sum_gate[i] += grad_gate[i];", "sum_gate[i] += x[0][i];", "exceeds"),
    "sums of one warp's rows": (*KERNEL, "(tile.row) + warp_of() / 2;", "(tile.row);", "races"),
    "sums of every other row": (*CORE, "lanes = 8; lanes < 32", "lanes = 16; lanes < 32", "exceeds"),
    "columns of sums": (*CORE, "warp_column() + lane_of() * 8, columns", "lane_of() * 8, columns", "races"),
    "the gate's share of the input": (*KERNEL, "product.a2 = p.grad_gate, product.b2 = p.w_gate;", "{}", "exceeds"),
}  # fmt: skip


def test_whole_kernels_pass_what_broken_ones_must_fail():
    attempt()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 3 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
