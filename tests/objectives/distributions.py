"""Bounds that a wrong distribution breaks, and a right one in one of some million runs."""

from __future__ import annotations

import numpy as np


def binomial(count, n, p):
    """Within five standard deviations."""
    assert abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9, f"{count} of {n}; expected {n * p:.0f}"


def chi_square(counts, shares):
    """Pearson's statistic within five standard deviations of its mean; cells that expect fewer than 10 are one."""
    counts, expected = np.asarray(counts, float), np.asarray(shares, float) * np.sum(counts)
    small = expected < 10
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    assert (counts[~keep] == 0).all()
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 5, f"{statistic:.1f} for {degrees} degrees of freedom"
