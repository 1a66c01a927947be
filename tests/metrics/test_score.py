"""The bootstrap: its intervals beside those that theory gives, its resamples, and no rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmengine.metrics import bootstrap, interval, intervals
from llmengine.metrics.score import BLOCK, check_paired, ratio


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def test_the_interval_of_a_share_is_that_of_the_normal_approximation():
    right = np.arange(2000) % 10 < 7
    score = interval(np.stack([right, np.ones(2000)], 1), mean)
    error = 1.96 * math.sqrt(0.7 * 0.3 / 2000)
    assert score.value == pytest.approx(0.7)
    assert (score.low, score.high) == pytest.approx((0.7 - error, 0.7 + error), abs=0.1 * error)


def test_the_interval_holds_the_truth_19_times_in_20():
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        right = generator.random(300) < 0.8
        score = interval(np.stack([right, np.ones(300)], 1), mean)
        held += score.low <= 0.8 <= score.high
    assert 180 <= held <= 199


def test_rows_of_a_kind_count_as_rows():
    """Kinds only save work: the same resamples, hence the same bits."""
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 5, 700)
    counts = generator.integers(0, 9, (5, 2)) + 1.0

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": mean(weights @ counts)}

    assert bootstrap(kinds, metrics)["mean"] == interval(counts[kinds], mean)


def test_resamples_are_of_all_rows_and_always_the_same(monkeypatch):
    seen = []

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        assert weights.size <= 40
        seen.append(weights)
        return {"rows": weights.sum(-1)}

    monkeypatch.setattr("llmengine.metrics.score.BLOCK", 40)
    bootstrap([0, 1, 2, 1], metrics)
    drawn, seen = np.concatenate(seen), []
    assert len(drawn) == 1001 and (drawn.sum(1) == 4).all() and drawn[0].tolist() == [1, 2, 1]
    assert drawn[1:].mean(0) == pytest.approx([1, 2, 1], abs=0.1)
    bootstrap([0, 1, 2, 1], metrics)
    assert (np.concatenate(seen) == drawn).all()


def test_memory_is_bounded_whatever_the_rows():
    largest = 0

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal largest
        largest = max(largest, weights.size)
        return {"rows": weights.sum(-1)}

    bootstrap(np.arange(50_000), metrics)
    assert largest <= BLOCK


def test_no_rows_give_nan_and_one_row_its_own_value():
    empty = intervals(np.empty((0, 2)), {"mean": mean})["mean"]
    assert all(map(math.isnan, (empty.value, empty.low, empty.high)))
    one = interval([[3.0, 4.0]], mean)
    assert (one.value, one.low, one.high) == (0.75, 0.75, 0.75)


def test_ratio_of_nothing_is_zero():
    assert ratio(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0])).tolist() == [0.5, 0.0, 0.0]
    assert ratio(np.array([[2.0], [4.0]]), np.array([2.0, 0.0])).tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_columns_of_different_lengths_are_named():
    with pytest.raises(ValueError, match="spans: there must be as many of each, one a row; got gold 2, predicted 1"):
        check_paired("spans", gold=[1, 2], predicted=[1])
