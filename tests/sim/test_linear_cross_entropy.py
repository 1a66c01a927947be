"""Cross-entropy of a linear layer in CUDA (csrc/cuda/linear_cross_entropy.cu, and its products by both cores) in the
simulator: the samples that every backend's laws are tried on (on a GPU, too, where there is one), several spans and
blocks of classes, layouts, equal bits, and broken lines.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.cuda import linear_cross_entropy as cuda
from llmengine.backends.cuda.native import products_by
from llmengine.ops import linear_cross_entropy as ops
from llmengine.ops.registry import load
from llmengine.optim import MainGradients
from llmengine.testing import LAYOUTS, Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples import linear_cross_entropy
from llmengine.testing.simulator import SCHEDULES

from .harness import Break, assert_caught, device_of, places, places_of_products, schedule

HEAVY = (pytest.mark.heavy,)
AT_ONCE = ops.at_once  # which `scheduled` replaces
HALVES = (torch.bfloat16, torch.float16)
(OPERATOR,) = linear_cross_entropy.OPERATORS
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 8.0}


@pytest.fixture(autouse=True)
def scheduled(request, monkeypatch):
    """On tensors of the CPU, as on a GPU that was not asked for gradients at once."""
    schedule(request)
    monkeypatch.setattr(ops, "at_once", lambda *_: False)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """The backward takes one tile of tokens and classes at a time."""
    monkeypatch.setattr(cuda, "block_of", lambda tokens, _: (min(tokens, cuda.TILE), cuda.TILE))


@pytest.fixture
def few_spans(monkeypatch):
    """Of several tiles each, however wide a core's tiles are."""
    monkeypatch.setattr(cuda, "spans_of", lambda *_: 2)


def sample_of(tokens: int, d: int, classes: int, *, weighted: bool = False, ignored: int = 0, **options) -> Sample:
    g = torch.Generator().manual_seed(tokens + d + classes)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    target = torch.randint(classes, (tokens,), generator=g)
    target[:ignored] = -100
    kwargs: dict = options | {"linear_bias": randn(classes)} | ({"weight": randn(classes).abs()} if weighted else {})
    args = (randn(tokens, d), 3 * d**-0.5 * randn(classes, d), target)
    return Sample(f"{tokens} x {d} x {classes} {options}", args, kwargs, ("weight",))


def assert_right(sample: Sample, dtype: torch.dtype, backend: str = "cuda_sim", core: str = "sm80") -> None:
    given = sample.on(device_of(backend)).rounded(dtype)
    oracle = evaluate(OPERATOR.function, given.rounded(torch.float64), "reference")
    plain = evaluate(linear_cross_entropy.plain, given, None)
    with poison(), products_by(core):
        ours = evaluate(OPERATOR.function, given, backend)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name} {dtype}: loss")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name} {dtype}: grad {key}")
        assert ours[1][key].dtype == given.tensors()[key].dtype


def cases() -> list:
    """Each sample in one dtype, on Hopper's core every third; the others on demand."""

    def heavy(i: int, k: int, core: str) -> bool:
        return (i.bit_count() + k) % 2 == 1 or (core == "sm90a" and i % 3 > 0)

    return [
        pytest.param(
            s, dtype, *place, id=f"{s.name}-{dtype}-{'-'.join(place)}", marks=[HEAVY[0]] * heavy(i, k, place[1])
        )
        for i, s in enumerate(OPERATOR.samples())
        for k, dtype in enumerate(HALVES)
        for place in places_of_products()
    ]


@pytest.mark.parametrize("sample, dtype, backend, core", cases())
def test_samples_of_all_options(sample: Sample, dtype: torch.dtype, backend: str, core: str):
    assert_right(sample, dtype, backend, core)


# ---- tiles, spans, blocks --------------------------------------------------------------------------------------------


# One short of a tile of tokens or classes, whole ones, one more; more tiles of classes than there are spans.
SIZES = [(127, 33, 129), (128, 32, 128), (129, 8, 127), (257, 16, 256), (300, 72, 520), (5, 8, 30 * 128 + 3)]


@pytest.mark.parametrize("tokens, d, classes", SIZES)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("backend, core", places_of_products())
def test_edges_of_tiles(tokens: int, d: int, classes: int, options: dict, backend: str, core: str):
    sample = sample_of(tokens, d, classes, ignored=2, weighted=bool(options), **options)
    assert_right(sample, HALVES[tokens % 2], backend, core)


# Several tiles for each of a device's multiprocessors (see test_linear.py), and there several blocks of both.
FULL = {"cuda_sim": (300, 16, 520), "cuda": (4104, 72, 20008)}


@pytest.mark.parametrize("backend, core", places_of_products())
def test_a_full_device(backend: str, core: str):
    assert_right(sample_of(*FULL[backend], ignored=150, weighted=True, **EVERYTHING), HALVES[0], backend, core)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_blocks_of_tokens_and_classes(narrow_blocks, core: str, reduction: str):
    for dtype in HALVES:
        assert_right(
            sample_of(140, 24, 300, ignored=3, weighted=True, reduction=reduction, **EVERYTHING), dtype, core=core
        )


@pytest.mark.parametrize("d", [24, 20])  # bytes beside eight elements that are read at once, and one by one
def test_sums_of_many_blocks_are_rounded_once(narrow_blocks, core: str, d: int):
    for dtype in HALVES:
        assert_right(sample_of(20, d, 1500, reduction="none"), dtype, core=core)


@pytest.mark.parametrize("classes", [257, 600, 1100])  # less tiles than spans; one and two; two and three
def test_spans_of_several_tiles(few_spans, core: str, classes: int):
    for dtype, options in zip(HALVES, ({}, EVERYTHING), strict=True):
        assert_right(sample_of(20, 24, classes, weighted=bool(options), **options), dtype, core=core)


def test_a_span_is_whole_tiles_and_together_they_are_all_classes():
    for tokens, classes, processors in [
        (8192, 128256, 132),
        (1, 50257, 108),
        (5, 3843, 3),
        (300000, 7, 108),
        (0, 1, 3),
    ]:
        spans, tiles = cuda.spans_of(tokens, classes, processors), -(-classes // cuda.TILE)
        each = -(-tiles // spans)
        assert 1 <= spans <= max(tiles, 1) and (spans - 1) * each < tiles <= spans * each


def test_the_memory_of_a_block_is_bounded():
    for tokens, classes in [(8192, 128256), (8192, 256000), (100, 50257), (65536, 50304), (131072, 9), (0, 5), (7, 1)]:
        rows, columns = cuda.block_of(tokens, classes)
        assert rows == tokens or rows % cuda.TILE == 0
        assert columns % cuda.TILE == 0 and 0 < columns < classes + cuda.TILE
        assert columns * rows <= cuda.BLOCK[1]
    assert cuda.block_of(8192, 128256) == (4096, 2048) and cuda.block_of(8192, 256000) == (4096, 4096)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tiles_without_labels_have_no_gradient(core: str, reduction: str):
    given = sample_of(300, 16, 140, ignored=256, reduction=reduction).rounded(torch.bfloat16)
    with poison():
        outputs, gradients = evaluate(OPERATOR.function, given, "cuda_sim")
    assert not gradients[0][:256].any() and gradients[0][256:].any(1).all()
    assert reduction != "none" or not outputs[0][:256].any()
    assert_right(sample_of(300, 16, 140, ignored=256, reduction=reduction), torch.bfloat16, core=core)


def test_classes_that_are_ruled_out(core: str):
    """A bias of -inf, for whole tiles as well: probability 0, and no NaN."""
    sample = sample_of(20, 16, 300)
    sample.kwargs["linear_bias"][:200] = -torch.inf
    sample.args[2][:] = 200 + sample.args[2] % 100
    given = sample.rounded(torch.bfloat16)
    outputs, gradients = evaluate(OPERATOR.function, given, "cuda_sim")
    oracle = evaluate(OPERATOR.function, given.rounded(torch.float64), "reference")
    torch.testing.assert_close(outputs[0].double(), oracle[0][0], rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in gradients.values()) and not gradients[1][:200].any()


@pytest.mark.parametrize("classes, first, end", [(129, 128, 129), (257, 128, 192), (70, 0, 70)])
def test_a_logit_that_is_nan_makes_the_loss_nan(core: str, classes: int, first: int, end: int):
    """Where a warp sees no other logit, too: maxima pass over NaN."""
    sample = sample_of(9, 16, classes)
    sample.args[1][first:end] = torch.nan
    sample.args[2][:] = 0
    (loss, *_), gradients = evaluate(OPERATOR.function, sample.rounded(torch.bfloat16), "cuda_sim")
    assert loss.isnan().all() and gradients[0].isnan().all()


def test_a_target_that_is_no_class_makes_its_token_nan(core: str):
    x, w = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(10, 8).bfloat16()
    with llmengine.backend("cuda_sim"):
        losses = functional.linear_cross_entropy(x, w, torch.tensor([0, 10, -1, -100]), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, True, False]
    assert not gradient[3].any()


# ---- layouts and bits ------------------------------------------------------------------------------------------------


def equal(ours, other) -> bool:
    mine, its = ([*outputs, *gradients.values()] for outputs, gradients in (ours, other))
    return all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def close(ours, other) -> bool:
    mine, its = ([*outputs, *gradients.values()] for outputs, gradients in (ours, other))
    return all(torch.allclose(a, b, rtol=2**-6, atol=2**-6 * b.abs().max()) for a, b in zip(mine, its, strict=True))


# With at most 8 rows each, so that "huge stride" holds for every matrix, and with more.
@pytest.mark.parametrize("tokens, d, classes", [(6, 16, 8), (19, 24, 40)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_every_layout_is_right(core: str, layout: str, tokens: int, d: int, classes: int):
    """In the bits of any other, where one core multiplies all; what TMA cannot fetch the other one does."""
    sample = sample_of(tokens, d, classes, weighted=True, ignored=1, **EVERYTHING)
    expected = evaluate(OPERATOR.function, sample.rounded(torch.bfloat16), "cuda_sim")
    for key in sample.tensors():
        moved = sample.rounded(torch.bfloat16, LAYOUTS[layout], key)
        found = evaluate(OPERATOR.function, moved, "cuda_sim")
        assert equal(found, expected) if core == "sm80" else close(found, expected), key


def test_expanded_gradients(core: str):
    given = sample_of(19, 24, 40, reduction="none").rounded(torch.bfloat16)
    expanded = evaluate(OPERATOR.function, given, "cuda_sim", lambda o: o.new_ones(()).expand(o.shape))
    assert equal(expanded, evaluate(OPERATOR.function, given, "cuda_sim", torch.ones_like))


def test_gradients_appear_only_where_asked(narrow_blocks, core: str):
    given = sample_of(19, 24, 200).rounded(torch.float16)
    everything = evaluate(OPERATOR.function, given, "cuda_sim")[1]
    for wanted in everything:
        alone = Sample(given.name, given.args, given.kwargs, tuple(k for k in everything if k != wanted))
        with poison():
            assert torch.equal(evaluate(OPERATOR.function, alone, "cuda_sim")[1][wanted], everything[wanted]), wanted


def test_the_gradient_of_a_float32_weight_is_not_rounded(core: str):
    given = sample_of(40, 24, 40).rounded(torch.bfloat16)
    wide = Sample(given.name, (given.args[0], given.args[1].float(), given.args[2]), given.kwargs)
    narrow, kept = (evaluate(OPERATOR.function, s, "cuda_sim", torch.ones_like)[1][1] for s in (given, wide))
    assert (
        kept.dtype == torch.float32 and torch.equal(kept.bfloat16(), narrow) and not torch.equal(kept, narrow.float())
    )


def test_equal_bits_under_every_schedule(narrow_blocks, core: str):
    from llmengine import _cuda_sim

    given = sample_of(130, 40, 270, ignored=2, weighted=True, **EVERYTHING).rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        results.append(evaluate(OPERATOR.function, given, "cuda_sim"))
    assert all(equal(results[0], other) for other in results[1:])


# ---- loss and gradients at once --------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """As on a GPU that is asked not to recompute, 130 tokens at a time."""
    asked = []
    monkeypatch.setattr(ops, "at_once", lambda *_: asked.append(True) or True)
    monkeypatch.setattr(ops, "block_tokens", lambda *_: 130)
    return asked


MAKERS = pytest.mark.parametrize("backend, maker", [*((p, "blas") for p in places()), *places_of_products()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens, classes", [(130, 75), (300, 136)], ids=["one block", "three blocks"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@MAKERS
def test_gradients_made_with_the_loss(
    at_once, backend: str, maker: str, tokens: int, classes: int, reduction: str, options: dict
):
    """By the law, with logits that were rounded to 16 bits, as plain PyTorch's are; of several blocks beside a float32
    weight, as under autocast."""
    half = sample_of(tokens, 24, classes, ignored=3, weighted=bool(options), reduction=reduction, **options)
    half = half.on(device_of(backend)).rounded(torch.bfloat16)
    x, w, target = half.args
    given = Sample(half.name, (x, w.float() if tokens > 130 else w, target), half.kwargs, half.constants)
    oracle = evaluate(OPERATOR.function, half.rounded(torch.float64), "reference")
    plain = evaluate(linear_cross_entropy.plain, half, None)
    at_once.clear()
    with poison(), products_by(maker):
        ours = evaluate(OPERATOR.function, given, backend)
    assert at_once
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{half.name}: loss")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{half.name}: grad {key}")
        assert ours[1][key].dtype == given.tensors()[key].dtype


@pytest.mark.parametrize("tokens, wide", [(0, True), (150, False)], ids=["no tokens", "a 16-bit weight in blocks"])
def test_what_is_not_made_at_once_goes_through_both_passes(core: str, tokens: int, wide: bool):
    x, w, target = sample_of(tokens, 24, 40).rounded(torch.bfloat16).args
    given, options = (x, w.float() if wide else w, None, target, None), ("mean", -100, 0.1, 1e-3, 0.0)
    wanted = [True, True, False]
    with llmengine.backend("cuda_sim"):
        loss, lse, normaliser = ops.linear_cross_entropy_forward(*given, *options)
        apart = ops.linear_cross_entropy_backward(torch.ones(()), *given, lse, normaliser, *options, 0.0, None, wanted)
        together = ops.linear_cross_entropy_with_gradients(*given, *options, 130, False, wanted)
    assert all(torch.equal(a, b) for a, b in zip(together, (loss, *apart), strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_no_labels_have_loss_and_gradients_of_zero_at_once(at_once, core: str, weighted: bool):
    given = sample_of(9, 8, 21, ignored=9, weighted=weighted).rounded(torch.bfloat16)
    with poison():
        (loss,), gradients = evaluate(OPERATOR.function, given, "cuda_sim")
    assert at_once and loss == 0 and not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@MAKERS
def test_float16_is_made_with_the_loss(at_once, backend: str, maker: str, options: dict):
    """In three blocks: gradients wait in float32."""
    sample = sample_of(300, 24, 136, ignored=3, weighted=bool(options), **options)
    assert_right(sample, torch.float16, backend, maker)
    assert at_once


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", places())
def test_gradients_that_float16_does_not_hold_before_the_loss_is_scaled(at_once, backend: str, weighted: bool):
    """Of classes so improbable that the loss changes with their logits by 2^-26 at most."""
    sample = sample_of(200, 16, 40, weighted=weighted).on(device_of(backend)).rounded(torch.float16)
    x, w, target = sample.args
    weights, bias = sample.kwargs.get("weight"), torch.zeros(40, device=x.device)
    target.clamp_(max=19)
    bias[:20] = 24.0

    def gradients(x, w, function):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        weight = None if weights is None else weights.to(x.dtype)
        loss = function(*leaves, target, linear_bias=bias.to(x.dtype), weight=weight)
        return [g.double() for g in torch.autograd.grad(2.0**18 * loss, leaves)]

    with llmengine.backend(backend):
        of_x, of_w = gradients(x, w, functional.linear_cross_entropy)
    assert at_once
    exact_x, exact_w = gradients(x.double(), w.double(), linear_cross_entropy.plain)
    for ours, exact in ((of_x, exact_x), (of_w[:20], exact_w[:20]), (of_w[20:], exact_w[20:])):
        assert (ours - exact).norm() < 2e-2 * exact.norm() and exact.any()


@pytest.mark.parametrize("dtype", HALVES)
@MAKERS
def test_a_buffer_takes_the_gradient_that_was_made_with_the_loss(at_once, backend: str, maker: str, dtype: torch.dtype):
    """Unrounded, in three blocks, once the loss's is known; again where the graph is kept."""
    x, w, target = sample_of(300, 24, 136, ignored=3).on(device_of(backend)).rounded(dtype).args
    ours, wide = torch.nn.Parameter(w), torch.nn.Parameter(w.float())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    MainGradients([ours])
    ours.main_grad.fill_(0.25)
    with llmengine.backend(backend), products_by(maker), poison():
        losses = [functional.linear_cross_entropy(a, b, target) for a, b in zip(inputs, (ours, wide), strict=True)]
        assert len(at_once) == 2 and (ours.main_grad == 0.25).all()
        for loss in losses:
            (3.0 * loss).backward(retain_graph=True)
        torch.testing.assert_close(ours.main_grad, wide.grad + 0.25, rtol=1e-5, atol=1e-6)
        losses[0].backward()
    torch.testing.assert_close(ours.main_grad, 4 / 3 * wide.grad + 0.25, rtol=1e-5, atol=1e-6)
    assert ours.grad is None and all(i.grad.dtype == dtype for i in inputs)


@MAKERS
def test_a_frozen_weight_of_16_bits_goes_in_blocks(at_once, backend: str, maker: str):
    given = sample_of(300, 24, 136, ignored=3)
    assert_right(Sample(given.name, given.args, given.kwargs, (1, *given.constants)), torch.bfloat16, backend, maker)
    assert at_once


def test_made_at_once_where_our_kernels_were_asked_and_have_the_memory(monkeypatch):
    class Given:  # of a device that this machine may not have
        device = torch.device("cuda")

        def __init__(self, *shape: int, dtype=torch.bfloat16, frozen: bool = False):
            self.shape, self.dtype, self.requires_grad = torch.Size(shape), dtype, not frozen

        def element_size(self) -> int:
            return self.dtype.itemsize

    def at_once(
        tokens: int, classes: int, *, x=torch.bfloat16, weight=torch.bfloat16, frozen=False, reduction="mean",
        recompute=False, main=None,
    ) -> bool:  # fmt: skip
        given = Given(tokens, 8, dtype=x), Given(classes, 8, dtype=weight, frozen=frozen)
        return AT_ONCE(*given, reduction, 5.0, recompute, main)

    monkeypatch.setattr(load("cuda"), "unavailable", None)
    monkeypatch.setattr(ops, "demanded", lambda: None)
    assert at_once(4096, 128256) and at_once(8192, 128256) and not at_once(8192, 128256, recompute=True)
    assert not at_once(8192, 256000) and at_once(8192, 256000, weight=torch.float32)
    assert at_once(8192, 256000, frozen=True) and at_once(8192, 256000, main=torch.empty(0))
    assert at_once(8192, 256000, x=torch.float16, weight=torch.float16) and not at_once(8, 9, x=torch.float32)
    assert not at_once(4096, 128256, reduction="none")
    assert ops.block_tokens(Given(65536, 8), Given(128256, 8, dtype=torch.float32)) == 8192
    monkeypatch.setattr(ops, "demanded", lambda: "triton")
    assert not at_once(4096, 128256)
    monkeypatch.setattr(ops, "demanded", lambda: "cuda")
    assert at_once(4096, 128256)
    monkeypatch.setattr(load("cuda"), "unavailable", "it was not built")
    assert not at_once(4096, 128256)


def test_what_is_not_supported_names_itself():
    x, target = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    with (
        llmengine.backend("cuda_sim"),
        pytest.raises(RuntimeError, match="multiplies bfloat16 and float16, got float32"),
    ):
        functional.linear_cross_entropy(x, torch.randn(5, 8), target)


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt(core: str) -> None:
    assert_right(sample_of(133, 40, 300, ignored=2), HALVES[0], core=core)
    assert_right(sample_of(9, 8, 5, reduction="none"), HALVES[1], core=core)
    assert_right(sample_of(70, 24, 800, weighted=True, reduction="none", **EVERYTHING), HALVES[1], core=core)
    assert_right(sample_of(20, 24, 1500), HALVES[0], core=core)
    assert_right(sample_of(40, 72, 130), HALVES[0], core=core)  # whose last stage lies where tokens will
    sums = sample_of(40, 24, 270, weighted=True, ignored=1, label_smoothing=0.3, reduction="sum")
    sums.args[0][0] *= 1e3  # an ignored token's logits, whose exponentials are infinite
    assert_right(sums, HALVES[0], core=core)
    if core == "sm90a":
        sample = sample_of(260, 24, 520, weighted=True, **EVERYTHING)
        assert_right(sample, HALVES[0], core=core)
        del sample.kwargs["linear_bias"]  # whose sums bring barriers
        with pytest.MonkeyPatch.context() as wide:  # a block takes several tiles
            wide.setattr(cuda, "block_of", lambda tokens, classes: (tokens, 4 * cuda.TILE))
            assert_right(sample, HALVES[0], core=core)


KERNEL, LOSS = ("linear_cross_entropy_sm80", "linear_cross_entropy_sm80.cu"), "token_loss.cuh"
ENDS = ("linear_cross_entropy_sm80", "linear_cross_entropy_products.cuh")
OPERATION = ("linear_cross_entropy", "linear_cross_entropy.cu")
SUMS = ("gemm_sm80", "gemm_result.cuh")
HOPPER = ("linear_cross_entropy_sm90a", "linear_cross_entropy_sm90a.cu")
BREAKS: dict[str, Break] = {
    "classes past the last": (*ENDS, "return inside ? z : -INFINITY;", "return z;", "exceeds"),
    "no barrier between tiles": (*KERNEL, "__syncthreads();  // every warp is done with the stages", "//", "races"),
    "no barrier before the end": (*KERNEL, "__syncthreads();  // both warps of a row", "//", "races"),
    "the maximum of two lanes": (
        *KERNEL, "most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));", "", "exceeds|inf|NaN",
    ),
    "the sum of two lanes": (*ENDS, "return x + __shfl_xor_sync(kWholeWarp, x, 2);", "return x;", "exceeds"),
    "no rescaling": (
        *KERNEL, "known.total[half] * exp_below(before, higher)", "known.total[half]", "exceeds",
    ),
    "one warp's sum as it is": (
        *KERNEL, "halves.total[1][line] * exp_below(halves.largest[1][line], largest)", "halves.total[1][line]",
        "exceeds",
    ),
    "rows of both warps": (*KERNEL, "side = side_of_warp()", "side = 0", "races"),
    "rows of the first of four threads": (*KERNEL, "lane_of() % 4 != m", "lane_of() % 4 != 0", "exceeds|inf|NaN"),
    "no barrier after the last stages": (
        *KERNEL, "__syncthreads();  // every warp is done with the last stages", "", "races",
    ),
    "tokens written over stages": (*KERNEL, "__syncthreads();  // every warp is done with the stages\n", "\n", "races"),
    "tokens over panels": (*KERNEL, "(shared + gemm::kPanelBytes)", "(shared)", "races|exceeds|NaN"),
    "the logit of another class": (*KERNEL, "if (place == 8 * j + i)", "if (place == 8 * j + i + 1)", "exceeds|NaN"),
    "a token past the last": (
        *ENDS, "  if (token >= tokens) return kIgnored;\n", "", "past the end of target",
    ),
    "labels are read too soon": (
        *KERNEL, "__syncthreads();  // the labels are there\n  // nobody", "// nobody", "races|no thread",
    ),
    "labels of the backward are read too soon": (
        *KERNEL, "__syncthreads();  // the labels are there\n  gemm::", "gemm::", "races|no thread",
    ),
    "the span before": (*KERNEL, "place.column * p.tiles_of_span * gemm::kTile;", "0;", "exceeds|races"),
    "spans are not brought together": (
        *OPERATION, "part[p.tokens] * exp_below(part[0], higher)", "part[p.tokens]", "exceeds",
    ),
    "the bias of the block": (
        *ENDS, "add_line<T>(p.bias, column, o.classes", "add_line<T>(p.bias, column % 128, o.classes", "exceeds",
    ),
    "ignored tokens have gradients": (
        *ENDS, "if (tokens.label[line] == kIgnored) {", "if (false) {", "NaN|nan|exceeds",
    ),
    "the target's share": ("linear_cross_entropy_sm80", LOSS, "i == place ?", "i <= place ?", "exceeds"),
    "the softcap's slope": ("linear_cross_entropy_sm80", LOSS, "1.0f - tangent[i] * tangent[i]", "1.0f", "exceeds"),
    "the input's sums begin anew": (*OPERATION, "product.goes_on = first > 0,", "product.goes_on = false,", "exceeds"),
    "the weight's sums begin anew": (*OPERATION, "product.goes_on = token > 0,", "product.goes_on = false,", "exceeds"),
    "the first tokens again": (
        *OPERATION, "rows_from(p.input, token, tokens)", "rows_from(p.input, 0, tokens)", "exceeds",
    ),
    "targets of the first tokens": (*ENDS, "  to.options.target += part.token;\n", "", "exceeds"),
    "lse of the first tokens": (*ENDS, "p.lse.as<float>() + part.token", "p.lse.as<float>()", "exceeds|inf"),
    "sums of the first tokens": (*ENDS, "rows_from(p.partial_bias, part.token / 64,", "rows_from(p.partial_bias, 0,",
                                 "exceeds|NaN|no thread"),
    "sums in 16 bits": (*SUMS, "half << 16 | byte << 8", "half << 16", "exceeds"),
    "bytes of other elements": (*SUMS, "lower[i / 4] |= (bits >> 8 & 0xff) << i % 4 * 8;",
                                "lower[1 - i / 4] |= (bits >> 8 & 0xff) << i % 4 * 8;", "exceeds"),
    "sums of the last block": (*OPERATION, "sums.data = sums.as<float>() + first, ", "", "exceeds|NaN"),
    "a thread's sum as it is": (
        *HOPPER, "sum_of_four(total[half] * exp_below(largest[half], higher))", "sum_of_four(total[half])", "exceeds",
    ),
    "the largest of one thread": (
        *HOPPER, "float higher = fmaxf(largest[half], __shfl_xor_sync(kWholeWarp, largest[half], 1));",
        "float higher = largest[half];", "exceeds|inf|NaN",
    ),
    "no rescaling within a span": (*HOPPER, "total[half] * exp_below(largest[half], higher);\n    const int place",
                                   "total[half];\n    const int place", "exceeds"),
    "tokens of other lanes": (*HOPPER, "% 32 / 4 +", "% 32 / 8 +", "exceeds|races|NaN"),
    "what was known of the span before": (*HOPPER, "largest[half] = -INFINITY, total[half] =", "",
                                          "exceeds|NaN|nan"),
    "logits of the first panel": (*HOPPER, "if (panel != q) continue;", "if (q != 0) continue;", "exceeds|NaN"),
    "classes of the first panel": (
        *HOPPER, "place.column + panel * kPanel + lane", "place.column + lane", "exceeds|NaN",
    ),
    "another token's own logit": (*HOPPER, "place == 8 * j + i) p.target", "place == 8 * j + i + 1) p.target",
                                  "exceeds|NaN"),
    "weights without their logits": (*HOPPER, "if (p.options.share <= 0.0f) return;", "return;", "exceeds"),
    "spans in one place": (*HOPPER, "place.span * 3 * tokens", "0", "races|exceeds|NaN"),
    "a token past the last of a cluster": (*HOPPER, "lane_of_four() != 0 || token >= tokens", "lane_of_four() != 0",
                                           "past the end|races"),
    "factors are read too soon": (
        *HOPPER, "begin_token(to, own(), line, place.row + line);\n    ptx::barrier_sync(group, 128);",
        "begin_token(to, own(), line, place.row + line);", "races|no thread",
    ),
    "factors are written over too soon": (
        *HOPPER, "    ptx::barrier_sync(group, 128);  // the tokens before have been looked at\n", "", "races",
    ),
    "factors of half the tokens": (*HOPPER, "if (line < 64) begin_token", "if (line < 32) begin_token", "no thread"),
    "tokens of the other warpgroup": (*HOPPER, "tokens[threadIdx.x / 128 - 1]", "tokens[0]", "races"),
}  # fmt: skip


@pytest.mark.parametrize("which", ["sm80", "sm90a"])
def test_whole_kernels_pass_what_broken_ones_must_fail(narrow_blocks, few_spans, which: str):
    attempt(which)


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 3 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(narrow_blocks, few_spans, name: str, tmp_path: Path, monkeypatch):
    core = "sm90a" if "sm90a" in BREAKS[name][0] else "sm80"
    assert_caught(BREAKS[name], lambda: attempt(core), tmp_path, monkeypatch)
