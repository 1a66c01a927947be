"""The linear layer in 8-bit floats: how numbers are rounded, how far results are from float64's, what is refused. That
backends agree are the laws of tests/test_ops.py; kernels: tests/sim/test_fp8.py.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional, nn
from llmengine.backends.fp8 import FORMATS
from llmengine.backends.reference.fp8_linear import LEAST, quantise, values
from llmengine.ops import registry
from llmengine.optim import MainGradients

BLOCKS = pytest.mark.parametrize("block", [0, 1, 128])
EVERY = pytest.mark.parametrize("format", FORMATS)
SCALINGS = pytest.mark.parametrize("scaling", ["tensor", "block"])
# The largest error of a normal number, in relation to it, and of a subnormal one.
ROUNDING = {"e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17)}


def number_line(format: str) -> Tensor:
    """All finite numbers of a format, in order, by its definition: of 7 bits, e and mantissa."""
    mantissa, bias = (3, 7) if format == "e4m3" else (2, 15)
    bits = torch.arange(126 + 1 if format == "e4m3" else 0x7B + 1)
    exponent, fraction = bits >> mantissa, (bits & (1 << mantissa) - 1).double() / (1 << mantissa)
    normal = (1 + fraction) * 2.0 ** (exponent - bias).double()
    return torch.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)


@EVERY
def test_numbers_are_the_nearest_ones_and_of_two_the_even_one(format: str):
    """Magnitudes up to the largest, with one scale of exactly 1: all numbers, what lies in the middle of two, and near
    it; against a search among all numbers."""
    line = number_line(format)
    middle = (line[1:] + line[:-1]) / 2
    x = torch.cat([line, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)])
    x = torch.cat([x, -x]).float().view(1, -1)
    found = quantise(x, format, 0)
    assert found[1].item() == 1.0
    distance = (x.abs().double().T - line).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = nearest & ((torch.arange(len(line)) % 2 == 0) | (nearest.sum(1, keepdim=True) == 1))
    expected = even.int().argmax(1)
    assert torch.equal(found[0][0, : x.shape[1]].int() & 0x7F, expected.int())
    assert torch.equal(values(*found, format, 0, torch.float64)[0, : x.shape[1]], line[expected] * x[0].sign())


@EVERY
@BLOCKS
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (128, 128), (130, 300)], ids=str)
def test_errors_are_half_a_unit_and_the_largest_of_a_block_is_kept(shape, block: int, format: str):
    """Edges of blocks need not be multiples of 128; what is added to k is 0."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(shape[1]).remainder(23)
    numbers, scales = quantise(x, format, block)
    lines, k = shape
    assert numbers.shape == (lines, -(-k // 16) * 16) and not numbers[:, k:].any()
    assert scales.shape == ((1, 1) if block == 0 else (-(-k // 128), -(-lines // block)))
    relative, absolute = ROUNDING[format]
    found = values(numbers, scales, format, block, torch.float64)[:, :k]
    most = torch.finfo(FORMATS[format]).max
    for top in range(0, lines, block or lines):
        for left in range(0, k, 128 if block else k):
            here = (slice(top, top + (block or lines)), slice(left, left + (128 if block else k)))
            magnitude = x[here].abs().double()
            scale = magnitude.max() / most
            assert ((found[here] - x[here]).abs() <= magnitude * (relative + 2**-22) + scale * absolute).all()
            torch.testing.assert_close(found[here].abs().max(), magnitude.max(), rtol=2**-22, atol=0)


@EVERY
@BLOCKS
def test_what_is_not_finite_becomes_nan_and_scales_nothing(block: int, format: str):
    x = torch.ones(130, 140)
    x[1, 2], x[1, 139], x[129, 0] = torch.inf, -torch.inf, torch.nan
    found = values(*quantise(x, format, block), format, block, torch.float32)[:, :140]
    assert torch.equal(found.isnan(), ~x.isfinite())
    torch.testing.assert_close(found[x.isfinite()], torch.ones(130 * 140 - 3), rtol=2**-22, atol=0)


@EVERY
@BLOCKS
@pytest.mark.parametrize("largest", [0.0, 2.0**-149, 2.0**-126, LEAST, 3.4e38])
def test_scales_of_the_smallest_and_largest_are_normal_numbers(largest: float, block: int, format: str):
    x = torch.full((3, 20), largest)
    numbers, scales = quantise(x, format, block)
    assert (scales >= torch.finfo(torch.float32).tiny).all() and scales.isfinite().all()
    found = values(numbers, scales, format, block, torch.float32)[:, :20]
    expected = x if largest >= LEAST else torch.zeros(3, 20)  # far below what it counts as, it vanishes
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=LEAST * 2**-12)


def test_blocks_keep_outliers_to_themselves():
    """A number 2^20 times the others costs them all their bits, of its block alone."""
    x = torch.ones(4, 256)
    x[0, 0] = 2.0**20
    found = {b: values(*quantise(x, "e4m3", b), "e4m3", b, torch.float32) for b in (0, 1, 128)}
    ones = {b: (v[x == 1] == 1).reshape(-1) for b, v in found.items()}
    assert not ones[0].any() and ones[1].sum() == 4 * 256 - 128 and ones[128].sum() == 4 * 128


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


@SCALINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_within_the_roundings_of_their_terms(dtype: torch.dtype, scaling: str):
    """Of result and gradients: each number errs by its format's relative error (with what is below its scale's normal
    numbers, which is little here), so that a sum errs by that of its terms' magnitudes."""
    g = torch.Generator().manual_seed(3)
    x, weight, upstream = (torch.randn(s, generator=g).to(dtype) for s in ((70, 200), (90, 200), (70, 90)))
    for grad_format in FORMATS:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        output = functional.fp8_linear(*leaves, scaling=scaling, grad_format=grad_format)
        gradients = torch.autograd.grad(output, leaves, upstream)
        cases = [
            (output.detach(), x, weight, "e4m3"),
            (gradients[0], upstream, weight.T, grad_format),
            (gradients[1], upstream.T, x.T, grad_format),
        ]
        for found, a, b, format in cases:
            each = (1 + ROUNDING[format][0]) * (1 + ROUNDING["e4m3"][0]) - 1
            terms = exact(a.abs(), b.abs())
            allowed = (each + 0.005) * terms + torch.finfo(dtype).eps * terms
            error = (found - exact(a, b)).abs()
            assert (error <= allowed).all()
            # errors are of either sign: together they come to far less
            assert error.square().mean().sqrt() < 0.06 * terms.mean() and error.max() > 0


@SCALINGS
def test_gradients_are_those_of_the_rounded_numbers(scaling: str):
    """Straight through the rounding, exactly: dx = q(dy) q(w), dw = q(dy)^T q(x), each along what it sums over."""
    g = torch.Generator().manual_seed(4)
    x, w, dy = (
        torch.randn(s, generator=g, dtype=torch.float64).float().double() for s in ((130, 40), (150, 40), (130, 150))
    )
    blocks = (0, 0) if scaling == "tensor" else (1, 128)

    def rounded(t: Tensor, format: str, block: int) -> Tensor:
        return values(*quantise(t, format, block), format, block, torch.float64)[:, : t.shape[1]]

    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_(), torch.zeros(150).double().requires_grad_()]
    output = functional.fp8_linear(*leaves, scaling=scaling)
    torch.testing.assert_close(output.detach(), rounded(x, "e4m3", blocks[0]) @ rounded(w, "e4m3", blocks[1]).T)
    dx, dw, db = torch.autograd.grad(output, leaves, dy)
    torch.testing.assert_close(dx, rounded(dy, "e5m2", blocks[0]) @ rounded(w, "e4m3", blocks[1]))
    torch.testing.assert_close(dw, rounded(dy.T, "e5m2", blocks[0]) @ rounded(x.T, "e4m3", blocks[0]).T)
    torch.testing.assert_close(db, dy.sum(0))


def test_an_overflow_reaches_the_gradients():
    """As a gradient scaler must see it."""
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    upstream = torch.ones(5, 6)
    upstream[2, 3] = torch.inf
    dx, dw = torch.autograd.grad(functional.fp8_linear(x, weight), (x, weight), upstream)
    assert dx[2].isnan().all() and dw[3].isnan().all()
    assert dx.isnan().sum() == 8 and dw.isnan().sum() == 8


def test_autocast_and_float32_parameters():
    """As of `linear`: the input is cast, gradients come back in each parameter's dtype."""
    x, weight, bias = torch.randn(7, 40), torch.randn(24, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = functional.fp8_linear(x, weight, bias)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(6, 5)}, r"weight has shape \(6, 5\); expected \(6, 4\)"),
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\); expected \(out, 4\)"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\); expected \(6,\)"),
        ({"input": torch.ones(())}, r"input has shape \(\); expected \(\*, in\)"),
        ({"input": torch.ones(3, 4).to(torch.float8_e4m3fn)}, "input has dtype float8_e4m3fn; allowed: float32"),
        ({"weight": torch.ones(6, 4, device="meta")}, "weight is on meta but input is on cpu"),
        ({"scaling": "row"}, "scaling is 'row'; allowed: 'tensor', 'block'"),
        ({"grad_format": "e3m4"}, "grad_format is 'e3m4'; allowed: 'e4m3', 'e5m2'"),
    ],
)
def test_errors_name_argument_given_and_allowed(change, message):
    arguments = {"input": torch.ones(3, 4), "weight": torch.ones(6, 4), "bias": torch.ones(6)} | change
    with pytest.raises(ValueError, match=f"^fp8_linear: {message}"):
        functional.fp8_linear(**arguments)


# ---- what is kept, and where gradients go ----------------------------------------------------------------------------


@SCALINGS
def test_gradients_of_micro_batches_gather_in_a_buffer(scaling: str):
    g = torch.Generator().manual_seed(4)
    weights = [torch.nn.Parameter(torch.randn(24, 40, generator=g)) for _ in range(2)]
    with torch.no_grad():
        weights[1].copy_(weights[0])
    MainGradients(weights[:1])
    for _ in range(3):
        x = torch.randn(7, 40, generator=g)
        for weight in weights:
            functional.fp8_linear(x, weight, scaling=scaling).square().sum().backward()
    assert weights[0].grad is None
    torch.testing.assert_close(weights[0].main_grad, weights[1].grad, rtol=1e-6, atol=1e-6)


class Counted:
    """How often weights are rounded."""

    def __init__(self, monkeypatch):
        self.times, dispatch = 0, registry.dispatch

        def counted(name, args):
            self.times += name == "fp8_weight"
            return dispatch(name, args)

        monkeypatch.setattr(registry, "dispatch", counted)

    def during(self, call) -> int:
        before = self.times
        call()
        return self.times - before


CHANGES = {
    "torch's AdamW": lambda layer: torch.optim.AdamW([layer.weight], lr=0.1).step(),
    "our AdamW": lambda layer: llmengine.optim.AdamW([layer.weight], lr=0.1).step(),
    "an operator": lambda layer: layer.weight.detach().mul_(1.5),
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.detach() * 3),
    "another parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.detach() * 3)),
    "another scaling": lambda layer: setattr(layer, "scaling", "block"),
    "clear()": lambda layer: layer.kept.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_is_rounded_once_between_two_changes(change: str, monkeypatch):
    """Each time in the bits of a layer that keeps nothing: of result and gradients."""
    torch.manual_seed(1)
    layer = nn.Fp8Linear(40, 24, keep_weight=True)
    counted, x = Counted(monkeypatch), torch.randn(7, 40, requires_grad=True)

    def micro_batches() -> None:
        for _ in range(3):
            plain = functional.fp8_linear(x, layer.weight, layer.bias, scaling=layer.scaling)
            leaves = (x, layer.weight)
            expected, found = (torch.autograd.grad(o.square().sum(), leaves) for o in (plain, layer(x)))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            layer.weight.grad = found[1]

    assert counted.during(micro_batches) == 3 + 1
    with torch.no_grad():
        CHANGES[change](layer)
    assert counted.during(micro_batches) == 3 + 1
    with torch.no_grad():
        assert counted.during(lambda: layer(x)) == 0


def test_numbers_for_a_forward_alone_are_completed_for_a_backward(monkeypatch):
    layer, counted = nn.Fp8Linear(40, 24, keep_weight=True), Counted(monkeypatch)
    x = torch.randn(7, 40)
    assert [counted.during(lambda: layer(x)) for _ in range(2)] == [1, 0]
    x.requires_grad_()
    assert counted.during(lambda: layer(x).sum().backward()) == 1
    assert counted.during(lambda: layer(x.detach())) == 0


def test_numbers_of_inference_mode_serve_a_backward():
    layer = nn.Fp8Linear(40, 24, keep_weight=True)
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = layer(x)
    output = layer(x)
    output.sum().backward()
    assert torch.equal(output, expected) and layer.weight.grad.any()


def test_copies_keep_nothing_and_files_hold_nothing():
    layer = nn.Fp8Linear(40, 24, keep_weight=True)
    layer(torch.randn(7, 40))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(2)
    x = torch.randn(7, 40)
    assert torch.equal(other(x), functional.fp8_linear(x, other.weight, other.bias))
    assert set(layer.state_dict()) == {"weight", "bias"}
    nn.keep_fp8_weights(layer, False)
    assert not layer.keep_weight


def test_compiled_layers_keep_nothing():
    """Their graphs hold the rounding: a change of the weight is seen."""
    torch._dynamo.reset()
    layer, x = nn.Fp8Linear(40, 24, keep_weight=True), torch.randn(7, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), functional.fp8_linear(x, layer.weight, layer.bias))
        with torch.no_grad():
            layer.weight.mul_(2)


def test_captured_graphs_would_go_on_with_old_numbers(monkeypatch):
    layer, counted = nn.Fp8Linear(40, 24, keep_weight=True), Counted(monkeypatch)
    x = torch.randn(7, 40)
    layer(x)
    monkeypatch.setattr(importlib.import_module("llmengine.functional.fp8_linear"), "_is_captured", lambda weight: True)
    assert [counted.during(lambda: layer(x)) for _ in range(2)] == [1, 1]
