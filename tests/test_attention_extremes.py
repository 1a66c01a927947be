"""Attention where numbers end: large logits and biases, windows without end, scales that are none, keys that are no
numbers."""

from __future__ import annotations

import pytest
import torch
from ways import Way, ways

import llmengine
from llmengine.functional import scaled_dot_product_attention
from llmengine.ops.attention import attention_forward
from llmengine.testing import Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT

WAYS = pytest.mark.parametrize("way, dtype", ways())
LOWEST = torch.finfo(torch.float32).min


def with_bias(bias: torch.Tensor, dim: int) -> Sample:
    g = torch.Generator().manual_seed(dim)
    rows, keys = bias.shape
    tensors = (torch.randn(1, 2, n, dim, generator=g, dtype=torch.float64) for n in (rows, keys, keys))
    kept = {"float32_stays": ("attn_mask",)}  # bfloat16 and float16 have no such biases
    return Sample("", tuple(tensors), {"attn_mask": bias.double(), "return_lse": True}, **kept)


def assert_right(bias: torch.Tensor, same: torch.Tensor, way: Way, dtype: torch.dtype, dim: int = 32) -> None:
    """By the law, with what `same`, another bias, gives in float64 as the oracle; but lse, which tells of `bias`."""
    given, other = (with_bias(b, dim).on(way.target.device).rounded(dtype) for b in (bias, same))
    oracle = evaluate(scaled_dot_product_attention, other.rounded(torch.float64), "reference")
    plain = evaluate(scaled_dot_product_attention, given, "reference")
    with way.asked_for(), poison():
        ours = evaluate(scaled_dot_product_attention, given, way.target.backend)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, "output")
    assert torch.equal(ours[0][1].isfinite(), plain[0][1].isfinite())
    for key in oracle[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"grad {key}")


def test_the_log_sum_exp_of_large_logits_is_as_exact_in_two_floats():
    """Of one key it is the logit; its second part makes up for what the first rounds away."""
    for logit in (600.0, 5304.0, 196608.0):
        q, k = (torch.tensor([x, 0.0]).bfloat16().view(1, 1, 1, 2) for x in (logit, 1.0))
        k[..., 0] = 1
        options = (None, None, None, None, None, None, 1, 1, None, -1, -1, False, 1.0, 0.0, 0.0)
        with llmengine.backend("cpu"):
            _, lse, lse_low = attention_forward(q, k, torch.ones_like(k), *options)
        exact = q[..., 0].double()
        assert ((lse.double() + lse_low.double() - exact).abs() <= 2e-7 * exact).all()


@pytest.mark.parametrize("window", [(-1, 2**63 - 1), (2**63 - 1, -1), (2**63 - 1, 2**63 - 1), (2**62, 0)])
@pytest.mark.parametrize("causal", [None, "bottom_right"])
def test_windows_may_be_as_wide_as_numbers_go(window, causal):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, generator=g).bfloat16() for n in (60, 40, 40))
    narrow = tuple(min(side, 100) for side in window)
    given = Sample("", (q, k, v), {"window_size": window, "causal": causal})
    same = Sample("", (q, k, v), {"window_size": narrow, "causal": causal})
    for ours, expected in zip(*(evaluate(scaled_dot_product_attention, s, "cpu") for s in (given, same)), strict=True):
        values = [dict(enumerate(x)) if isinstance(x, (list, tuple)) else x for x in (ours, expected)]
        assert all(torch.equal(values[0][key], values[1][key]) for key in values[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_key_that_no_row_sees_may_hold_anything_but_has_no_gradient(poison):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 32, generator=g).bfloat16() for n in (40, 70, 70))
    k[0, 0, 45] = poison
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with llmengine.backend("cpu"):
        scaled_dot_product_attention(q, k, v, is_causal=True).float().sum().backward()
    assert not k.grad[0, 0, 40:].any() and not v.grad[0, 0, 40:].any()


@WAYS
def test_scales_that_a_float_cannot_hold_are_no_nan(way: Way, dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    options = {"is_causal": True, "window_size": (20, -1), "scale": 1e-46}
    given = Sample("", tuple(torch.randn(1, 1, 70, 32, generator=g) for _ in range(3)), options)
    given = given.on(way.target.device).rounded(dtype)
    oracle = evaluate(scaled_dot_product_attention, given.rounded(torch.float64), "reference")
    with way.asked_for(), poison():
        ours = evaluate(scaled_dot_product_attention, given, way.target.backend)
    assert_law(ours[0][0], oracle[0][0].to(dtype), oracle[0][0], OUTPUT, "output")
    assert not ours[1][0].any() and not ours[1][1].any()  # a scale of nothing has no gradients
    assert_law(ours[1][2], oracle[1][2].to(dtype), oracle[1][2], GRADIENT, "grad value")


@WAYS
def test_rows_that_see_no_key_have_zeros_whatever_values_hold(way: Way, dtype: torch.dtype):
    """Rows from 60 on, in tiles that other rows share, and in tiles of their own."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 32, generator=g).to(way.target.device, dtype) for n in (200, 50, 50))
    value[:, :, 49] = torch.nan
    query.requires_grad_()
    with way.asked_for(), poison(), llmengine.backend(way.target.backend):
        output, lse = scaled_dot_product_attention(query, key, value, window_size=(10, 0), return_lse=True)
        assert not output[:, :, 60:].any() and (lse[:, :, 60:] == -torch.inf).all()
        assert output[:, :, 49:60].isnan().all()
        if way.target.backend != "triton":  # which multiplies a tile of keys for rows that see none
            (gradient,) = torch.autograd.grad(output, query, torch.ones_like(output))
            assert not gradient[:, :, 128:].any()


# ---- large biases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-1e9, -1e10, -1e38, LOWEST], ids=lambda x: f"{x:.0e}")
@WAYS
def test_a_row_whose_keys_all_have_a_large_bias_sees_them_alike(bias: float, way: Way, dtype: torch.dtype):
    """Scores are less than the bias's last digit: probabilities are 1 / keys, forward and backward."""
    given, same = torch.zeros(20, 70), torch.zeros(20, 70)
    given[3], same[3] = bias, -1e30  # whose last digit is above scores also in float64
    assert_right(given, same, way, dtype)
    if bias == -1e9 and way.kernels == "sm90a" and not way.passes:
        assert_right(given, same, way, dtype, 136)  # of wide heads keys have a kernel of their own


@WAYS
def test_a_key_that_a_large_bias_raises_is_all_that_rows_see(way: Way, dtype: torch.dtype):
    bias = torch.zeros(20, 70)
    bias[:, 4] = 1e9
    assert_right(bias, bias, way, dtype)


@WAYS
def test_padding_on_the_left_by_a_large_bias(way: Way, dtype: torch.dtype):
    """As additive masks often are: the sum of two, so that rows of the padding see it, and twice of it what follows."""
    rows, padding = 40, 8
    hidden = torch.zeros(rows, rows)
    hidden[:, :padding] -= 1e10
    hidden += torch.full((rows, rows), -1e10).triu(1)
    same = torch.where(hidden == 0, 0.0, torch.where(hidden < -1.5e10, -2e30, -1e30))
    assert_right(hidden, same, way, dtype)
