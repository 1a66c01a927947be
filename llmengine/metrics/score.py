"""Scores and their confidence intervals.

Every metric is a function of sums over rows: accuracy of (right, rows), F1 of (true positives, predicted, present),
BLEU of n-gram counts. So one bootstrap (Efron 1979) serves them all: rows are drawn with replacement, their counts
summed, and the metric taken of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, CONFIDENCE = 1000, 0.95


@dataclass(frozen=True)
class Score:
    """A metric's value and its 95 % confidence interval over the choice of rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Rows of a report: text as it is, numbers with four digits."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True)
class Confusion:
    """counts[i, j]: rows of label i that were given label j."""

    labels: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True)
class Judgement:
    """What answers are worth. `main` names the score that the task is judged by."""

    scores: dict[str, Score]
    main: str
    rows: int
    lower_is_better: bool = False
    """Of the main score."""
    tables: tuple[Table, ...] = ()
    confusion: Confusion | None = None


def interval(counts: np.ndarray | Sequence, metric: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Score:
    """counts (rows, k): what each row adds to the sums (…, k) of which `metric` gives the value (…,).

    The interval is the middle 95 % of 1000 resamples of the rows, always the same ones. No rows: NaN.
    """
    counts = np.asarray(counts, np.float64)
    if len(counts) == 0:
        return Score(float("nan"), float("nan"), float("nan"))
    value = float(metric(counts.sum(0)))
    generator = np.random.default_rng(seed)
    n = len(counts)
    sums = np.stack([np.bincount(generator.integers(0, n, n), minlength=n) @ counts for _ in range(RESAMPLES)])
    low, high = np.quantile(metric(sums), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(value, float(low), float(high))
