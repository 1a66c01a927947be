"""Attention with products of 8-bit floats: how numbers are turned and rounded, how far results are from float64's, what
is refused. Samples: tests/test_ops.py; kernels: tests/sim/test_fp8_attention.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.fp8 import TILE, width_of
from llmengine.backends.reference import fp8_attention as reference

WIDTHS = pytest.mark.parametrize("width", [64, 128, 256])


@pytest.fixture(autouse=True)
def on_reference():
    with llmengine.backend("reference"):
        yield


def operands(kind: str, dim: int, rows: int = 64, keys: int = 1000) -> list[Tensor]:
    """In bfloat16. outliers: one number in a thousand is ten times as large; channel: one of keys is far off; mean: of
    values it is 1."""
    g = torch.Generator().manual_seed(dim)
    found = [torch.randn(1, 2, n, dim, generator=g) for n in (rows, keys, keys)]
    if kind == "outliers":
        found = [x + 10 * torch.randn(x.shape, generator=g) * (torch.rand(x.shape, generator=g) < 1e-3) for x in found]
    if kind == "channel":
        found[1][..., 3] += 20
    if kind == "mean":
        found[2] += 1
    return [x.bfloat16() for x in found]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def exact(*given: Tensor, **options) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in given), **options)


attention = functional.scaled_dot_product_attention

# ---- numbers ---------------------------------------------------------------------------------------------------------


@WIDTHS
def test_turning_keeps_products_but_for_their_width_and_has_no_sign_to_offer(width: int):
    matrix = reference.turned(torch.eye(width))
    assert torch.equal(matrix.abs(), torch.ones(width, width))
    assert torch.equal(matrix @ matrix.T, width * torch.eye(width))
    # a row of equal numbers is spread over all, too
    assert reference.turned(torch.ones(width)).abs().max() <= width / 2


@pytest.mark.parametrize("columns", [1, 40, 256])
@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_scales_are_the_least_powers_of_two_and_errors_half_a_unit(tokens: int, columns: int):
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(1))
    numbers, scales = reference.quantise(x)
    assert scales.shape == (2, -(-tokens // TILE))
    assert torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5)), "powers of two"
    for tile, scale in enumerate(scales.unbind(-1)):
        here = slice(tile * TILE, (tile + 1) * TILE)
        largest, scale = x[:, here].abs().amax((1, 2)), scale.double()
        assert (largest <= 448 * scale).all() and (largest > 224 * scale).all()
        found = numbers[:, here].double() * scale[:, None, None]
        error = (found - x[:, here]).abs()
        assert (error <= x[:, here].abs() * 2.0**-4 + scale[:, None, None] * 2.0**-10).all()


def test_neighbours_change_no_number_until_they_are_far_larger():
    x = torch.rand(128, 16, generator=torch.Generator().manual_seed(2)) + 0.5
    alone = reference.rounded(x, False)
    for large, changes in ((2.0**10, False), (2.0**16, True)):
        x[5, 3] = large
        others = reference.rounded(x, False)
        others[5, 3] = alone[5, 3]
        assert torch.equal(others, alone) != changes


@pytest.mark.parametrize("largest", [0.0, 2.0**-149, 2.0**-126, 448.0, 449.0, 3.4e38])
def test_extremes(largest: float):
    numbers, scales = reference.quantise(torch.full((3, 20), largest))
    assert scales.isfinite().all() and (scales >= 2.0**-126).all()
    found = numbers.double() * scales[:, None]
    torch.testing.assert_close(found, torch.full((3, 20), largest).double(), rtol=2**-4, atol=2.0**-135)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.05}], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 200])
def test_in_float64_it_is_pytorchs_attention_of_the_rounded_operands(dim: int, options):
    query, key, value = (x.double() for x in operands("normal", dim, 70, 300))
    q, k, v = (reference.rounded(x, turn) for x, turn in ((query, True), (key, True), (value, False)))
    scale = options.get("scale", dim**-0.5) / width_of(dim)
    expected = exact(q, k, v, **options | {"scale": scale})
    torch.testing.assert_close(attention(query, key, value, fp8=True, **options), expected, rtol=1e-12, atol=1e-12)


# Of the root mean square error in relation to that of the result; bfloat16's is 1.3e-3 to 2.3e-3 (MEASUREMENTS.md).
BOUNDS = {"normal": 0.06, "outliers": 0.07, "channel": 0.10, "mean": 4e-3}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", BOUNDS)
def test_errors_against_float64(kind: str, dim: int):
    given = operands(kind, dim)
    expected = exact(*given)
    found, lse = attention(*given, fp8=True, return_lse=True)
    assert rms(found - expected) < BOUNDS[kind] * rms(expected)
    assert rms(found - expected) > rms(attention(*given) - expected), "it is no better than bfloat16"
    logits = given[0].double() @ given[1].double().mT * dim**-0.5
    assert rms(lse - logits.logsumexp(-1)) < 0.1


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_turning_takes_the_weight_of_errors_from_large_products(dim: int, monkeypatch):
    """Where queries and keys are large in the same channel, scores err by far less; else by the same on the whole."""
    normal, aligned = (operands("normal", dim)[:2] for _ in range(2))
    for x in aligned:
        x[..., 3] *= 20
    errors = {}
    for name in ("turned", "as they are"):
        for kind, given in (("normal", normal), ("aligned", aligned)):
            query, key = (x.double() for x in given)
            found = reference.rounded(query, True) @ reference.rounded(key, True).mT / width_of(dim)
            errors[name, kind] = rms(found - query @ key.mT)
        monkeypatch.setattr(reference, "turned", lambda x: x * math.sqrt(x.shape[-1]))
    assert errors["turned", "aligned"] < 0.25 * errors["as they are", "aligned"]
    assert errors["turned", "normal"] < 1.02 * errors["as they are", "normal"]


def test_weights_sum_to_one():
    """What all values have in common comes out as it went in."""
    query, key, value = operands("normal", 64)
    value[:] = torch.linspace(-3, 3, 13)[torch.arange(64) % 13].bfloat16()
    assert torch.equal(
        attention(query, key, value, fp8=True)[0, 0, 0], reference.rounded(value, False)[0, 0, 0].bfloat16()
    )


def test_packed_sequences_are_those_alone():
    lengths = torch.tensor([0, 5, 5, 140, 300], dtype=torch.int32)
    query, key, value = (x[0].transpose(0, 1) for x in operands("normal", 40, 300, 300))
    packed = functional.varlen_attention(query, key, value, lengths, lengths, 160, 160, is_causal=True, fp8=True)
    for first, last in itertools.pairwise(lengths.tolist()):
        alone = attention(*(x[first:last].transpose(0, 1) for x in (query, key, value)), is_causal=True, fp8=True)
        assert torch.equal(packed[first:last], alone.transpose(0, 1))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "does not go with attn_mask; allowed: is_causal, causal"),
        ({"alibi_slopes": torch.ones(1)}, "does not go with alibi_slopes"),
        ({"distance_bias": torch.ones(1, 3)}, "does not go with distance_bias"),
        ({"softcap": 3.0}, "does not go with softcap"),
        ({"dropout_p": 0.1}, "does not go with dropout_p"),
        ({"scale": 0.0}, "takes a scale above 0, got 0.0"),
        ({"scale": -1.0}, "takes a scale above 0, got -1.0"),
    ],
)
def test_options_that_it_does_not_have_are_named(options, said: str):
    q = torch.ones(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"^scaled_dot_product_attention: fp8=True {said}"):
        attention(q, q, q, fp8=True, **options)
    if "attn_mask" not in options:
        ends, packed = torch.tensor([0, 4], dtype=torch.int32), torch.ones(4, 1, 8)
        with pytest.raises(ValueError, match=f"^varlen_attention: fp8=True {said}"):
            functional.varlen_attention(packed, packed, packed, ends, ends, 4, 4, fp8=True, **options)


def test_there_is_no_gradient_and_it_says_so():
    q, trained = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8, requires_grad=True)
    said = r"fp8=True has no gradient; allowed: a call under torch.no_grad\(\), or tensors that require none"
    for given in ((trained, q, q), (q, trained, q), (q, q, trained)):
        with pytest.raises(ValueError, match=said):
            attention(*given, fp8=True)
        with torch.no_grad():
            assert torch.equal(attention(*given, fp8=True), q)
    with pytest.raises(ValueError, match=said):
        attention(q, q, q, sinks=torch.zeros(1, requires_grad=True), fp8=True)


def test_autocast_casts_as_for_attention():
    q = torch.randn(1, 1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, q, q, fp8=True).dtype == torch.bfloat16
