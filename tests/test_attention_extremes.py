"""Attention where numbers end: large logits, windows without end, scales that are none, keys that are no numbers."""

from __future__ import annotations

import pytest
import torch

import llmengine
from llmengine.functional import scaled_dot_product_attention
from llmengine.ops.attention import attention_forward
from llmengine.testing import Sample, evaluate


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


def test_scales_that_a_float_cannot_hold_are_no_nan():
    q, k, v = (torch.randn(1, 1, 70, 32).bfloat16() for _ in range(3))
    with llmengine.backend("cpu"):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, window_size=(20, -1), scale=1e-46)
    assert out.isfinite().all()
