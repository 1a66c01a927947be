"""The linear layer in CUDA with products of our own (llmengine/backends/cuda/linear.py) in the simulator: what the laws
of tests/test_ops.py leave out. The products themselves: test_gemm.py, test_gemm_sm90a.py.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.cuda import linear as backend
from llmengine.backends.cuda.native import PRODUCTS, products_by
from llmengine.backends.fp8 import SCALINGS
from llmengine.functional.linear import products
from llmengine.nn import fusing
from llmengine.testing import LAYOUTS, Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.simulator import SCHEDULES

from .harness import device_of, on_hopper, places_of_products, schedule

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


def sample_of(tokens: int, width: int, out: int) -> Sample:
    g = torch.Generator().manual_seed(tokens + width + out)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    args = (randn(tokens, width), randn(out, width, scale=width**-0.5))
    return Sample(f"{tokens} x {width} to {out}", args, {"bias": randn(out)})


# One short of a tile and one more, whole tiles; what TMA can fetch, and what it cannot.
@pytest.mark.parametrize(
    "tokens, width, out", [(127, 40, 129), (128, 64, 128), (264, 72, 384), (300, 24, 7), (3, 8, 264)]
)
@pytest.mark.parametrize("backend_name, core", places_of_products())
def test_edges_of_tiles(tokens: int, width: int, out: int, backend_name: str, core: str):
    for dtype in HALVES:
        assert_right(sample_of(tokens, width, out), dtype, backend_name, core)


def assert_right(sample: Sample, dtype: torch.dtype, backend_name: str, core: str) -> None:
    given = sample.on(device_of(backend_name)).rounded(dtype)
    oracle = evaluate(products, given.rounded(torch.float64), "reference")
    plain = evaluate(torch.nn.functional.linear, given, None)
    with poison(), products_by(core):
        ours = evaluate(products, given, backend_name)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{given.name} {dtype}: output")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{given.name} {dtype}: grad {key}")


# Several tiles for each of a device's multiprocessors, one after the other (three of the simulator, 132 of an H100);
# there the weight's gradient has so few that its k is cut into parts.
FULL = {"cuda_sim": (520, 24, 264), "cuda": (17928, 72, 1032)}


@pytest.mark.parametrize("backend_name, core", places_of_products())
def test_a_full_device(backend_name: str, core: str):
    assert_right(sample_of(*FULL[backend_name]), torch.bfloat16, backend_name, core)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backend_name", ["cuda_sim", *(["cuda"] if on_hopper() else [])])
def test_a_full_device_in_8_bits(backend_name: str, scaling: str):
    """Beside the reference, which multiplies the same numbers; tensor cores add 8-bit products with 14 bits."""
    given = sample_of(*FULL[backend_name]).on(device_of(backend_name)).rounded(torch.float32)
    call = functools.partial(functional.fp8_linear, scaling=scaling)
    with poison():
        ours, plain = (evaluate(call, given, name) for name in (backend_name, "reference"))
    for a, b in ((ours[0][0], plain[0][0]), *((ours[1][key], plain[1][key]) for key in plain[1])):
        assert (a - b).norm() < 2e-3 * b.norm()


def outcome(sample: Sample) -> list[Tensor]:
    outputs, gradients = evaluate(products, sample, "cuda_sim")
    return [*outputs, *gradients.values()]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_every_layout_is_right(core: str, layout: str):
    sample = sample_of(7, 16, 8)
    expected = outcome(sample.rounded(torch.bfloat16))
    for key in sample.tensors():
        for ours, other in zip(outcome(sample.rounded(torch.bfloat16, LAYOUTS[layout], key)), expected, strict=True):
            if core == "sm80":
                assert torch.equal(ours, other), key
            torch.testing.assert_close(ours, other, rtol=2**-6, atol=2**-6)


def test_expanded_gradients(core: str):
    given = sample_of(19, 24, 40).rounded(torch.bfloat16)
    expanded = evaluate(products, given, "cuda_sim", lambda o: o.new_ones(()).expand(o.shape))
    plain = evaluate(products, given, "cuda_sim", torch.ones_like)
    assert all(torch.equal(expanded[1][key], plain[1][key]) for key in plain[1])


def test_gradients_appear_only_where_asked(core: str):
    given = sample_of(19, 24, 40).rounded(torch.float16)
    everything = evaluate(products, given, "cuda_sim")[1]
    for wanted in everything:
        alone = Sample(given.name, given.args, given.kwargs, tuple(k for k in everything if k != wanted))
        with poison():
            assert torch.equal(evaluate(products, alone, "cuda_sim")[1][wanted], everything[wanted]), wanted


@pytest.mark.parametrize("maker", ["sm80", "sm90a", "blas"])
def test_the_gradient_of_a_float32_weight_is_not_rounded(maker: str, monkeypatch):
    monkeypatch.setenv(PRODUCTS, maker)
    given = sample_of(40, 24, 40).rounded(torch.bfloat16)
    wide = Sample(given.name, (given.args[0], given.args[1].float()), given.kwargs)
    narrow, kept = (evaluate(products, s, "cuda_sim", torch.ones_like)[1][1] for s in (given, wide))
    assert kept.dtype == torch.float32 and torch.equal(kept.bfloat16(), narrow)
    assert not torch.equal(kept, narrow.float())


def test_equal_bits_under_every_schedule(core: str):
    from llmengine import _cuda_sim

    given = sample_of(130, 40, 72).rounded(torch.bfloat16)
    found = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        found.append(outcome(given))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def calls_of_products(dtype: torch.dtype) -> list:
    x, target = torch.ones(3, 8, dtype=dtype, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    weight = torch.ones(8, 8, dtype=dtype)
    return [
        lambda: products(x, weight),
        lambda: functional.ffn(x, weight, weight),
        lambda: functional.linear_cross_entropy(x, weight, target, reduction="none"),
    ]


@pytest.mark.parametrize("number", range(3), ids=["linear", "ffn", "linear_cross_entropy"])
def test_hoppers_products_are_refused_on_other_gpus(number: int, monkeypatch):
    monkeypatch.setattr(cuda_sim.NATIVE, "capability", lambda on: (8, 0))
    refused = r"refuses: LLMENGINE_CUDA_PRODUCTS=sm90a is for compute capability 9\.0, the device has 8\.0"
    call = calls_of_products(torch.bfloat16)[number]
    with llmengine.backend("cuda_sim"):
        for maker in ("own", "sm80"):
            with products_by(maker):
                call().sum().backward()
        with products_by("sm80"):
            loss = call().sum()
        with products_by("sm90a"):
            for refusing in (call, loss.backward):
                with pytest.raises(RuntimeError, match=refused):
                    refusing()
            if number < 2:  # in float32 nothing of ours multiplies
                calls_of_products(torch.float32)[number]().sum().backward()


@contextlib.contextmanager
def under_autocast(dtype: torch.dtype):
    """As torch.autocast("cuda", dtype), which wants a device."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("maker, ours", [("sm80", True), ("blas", False)])
def test_projections_under_autocast_are_ours_where_they_are_asked_for(maker: str, ours: bool, monkeypatch):
    """On a GPU that only its tensors know of."""
    called = []
    monkeypatch.setenv(PRODUCTS, maker)
    monkeypatch.setattr(fusing, "FROM_ROWS", None)
    monkeypatch.setattr(functional, "linear", lambda *_: called.append("ours"))
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: called.append("PyTorch's"))
    x, leaf = SimpleNamespace(is_cuda=True, dtype=torch.float32), torch.nn.Linear(8, 4)
    fusing.linear(leaf, x)
    with under_autocast(torch.bfloat16):
        fusing.linear(leaf, x)
    assert called == ["PyTorch's", "ours" if ours else "PyTorch's"]


def test_ours_run_on_a_gpu_where_they_are_asked_for(monkeypatch):
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    float32 = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for maker, asked in ((None, False), ("", False), ("blas", False), ("own", True), ("sm80", True), ("sm90a", True)):
        monkeypatch.delenv(PRODUCTS, raising=False)
        if maker is not None:
            monkeypatch.setenv(PRODUCTS, maker)
        assert backend.asked_for(OnGpu()) is asked
        for autocast in HALVES:
            assert backend.asked_for(float32) is False
            with under_autocast(autocast):
                assert backend.asked_for(float32) is asked
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        OnGpu.dtype = dtype
        assert backend.asked_for(OnGpu()) == (dtype in HALVES)
    assert not backend.asked_for(torch.ones(2).bfloat16())
