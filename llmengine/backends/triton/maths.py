"""Elementwise functions that Triton offers in no form that is accurate and runs in its interpreter as well."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Within 2 units in the last place of float32. Near 0 a minimax polynomial, where the exponentials would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    t = x * x
    p = -0.0062824758
    p = p * t + 0.021077760
    p = p * t - 0.053853862
    p = p * t + 0.13332602
    p = p * t - 0.33333319
    return tl.where(tl.abs(x) < 0.55, x + x * t * p, tl.where(x < 0.0, -far, far))


@triton.jit
def softcapped(x, softcap):
    """softcap tanh(x / softcap)"""
    return softcap * tanh(x / softcap)
