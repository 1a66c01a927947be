"""Regression and perplexity beside SciPy and scikit-learn."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sklearn
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine.metrics import perplexity, regression

number = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=16))


def values(judgement) -> dict[str, float]:
    for score in judgement.scores.values():
        assert score.low <= score.high and not math.isnan(score.low + score.value + score.high)
    return {name: score.value for name, score in judgement.scores.items()}


@settings(max_examples=80)
@given(st.lists(st.tuples(number, number), min_size=2, max_size=40))
def test_regression_is_scipys_and_scikit_learns(pairs):
    gold, predicted = map(list, zip(*pairs, strict=True))
    defined = len(set(gold)) > 1 and len(set(predicted)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "mse": sklearn.mean_squared_error(gold, predicted),
            "mae": sklearn.mean_absolute_error(gold, predicted),
            "pearson": scipy.stats.pearsonr(gold, predicted)[0] if defined else 0,
            "spearman": scipy.stats.spearmanr(gold, predicted)[0] if defined else 0,
            "r2": sklearn.r2_score(gold, predicted),
        }
    assert values(regression(gold, predicted)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_numbers_far_from_zero_lose_nothing():
    gold = 1e6 + np.arange(50.0)
    predicted = gold + np.sin(gold)
    judged = values(regression(gold.tolist(), predicted.tolist()))
    assert judged["pearson"] == pytest.approx(scipy.stats.pearsonr(gold - 1e6, predicted - 1e6)[0], abs=1e-12)
    assert judged["r2"] == pytest.approx(sklearn.r2_score(gold - 1e6, predicted - 1e6), abs=1e-12)


def test_resamples_are_ranked_anew():
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 6, 40).astype(float)
    predicted = gold + generator.normal(size=40)
    score = regression(gold.tolist(), predicted.tolist()).scores["spearman"]
    draws = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = draws.integers(0, 40, 40)
        drawn.append(scipy.stats.spearmanr(gold[rows], predicted[rows])[0])
    assert (score.low, score.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-12)


def test_outputs_are_scored_one_by_one_and_rows_resampled_whole():
    """Outputs of unlike scales: pooled, the larger one alone would decide the correlations."""
    generator = np.random.default_rng(0)
    gold = generator.normal(size=(30, 1)) * [1, 10, 100] + generator.normal(scale=0.1, size=(30, 3)) + [0, 5, 1000]
    predicted = np.where([True, False, True], gold, -gold) + generator.normal(size=(30, 3))
    judged = regression(gold.tolist(), predicted.tolist(), ["a", "b", "c"])
    alone = [values(regression(x.tolist(), y.tolist())) for x, y in zip(gold.T, predicted.T, strict=True)]
    (table,) = judged.tables
    assert table.columns == ("output", *alone[0]) and [row[0] for row in table.rows] == ["a", "b", "c"]
    for row, one in zip(table.rows, alone, strict=True):
        assert row[1:] == pytest.approx(list(one.values()), rel=1e-12)
    means = {name: np.mean([one[name] for one in alone]) for name in alone[0]}
    assert judged.rows == 30 and values(judged) == pytest.approx(means, rel=1e-12)
    assert means["r2"] == pytest.approx(sklearn.r2_score(gold, predicted))
    draws, drawn = np.random.default_rng(0), []
    for _ in range(1000):
        rows = draws.integers(0, 30, 30)
        pairs = zip(gold[rows].T, predicted[rows].T, strict=True)
        drawn.append(np.mean([scipy.stats.spearmanr(x, y)[0] for x, y in pairs]))
    score = judged.scores["spearman"]
    assert (score.low, score.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-12)
    assert regression([1.0, 2.0], [1.0, 3.0]).tables == ()  # of one output the scores say all


@pytest.mark.parametrize("constant", [0.1, 1e8 / 3])
def test_constant_sides_have_no_correlation(constant):
    """Whatever their mean is rounded to."""
    numbers = [float(i) for i in range(7)]
    for gold, predicted, r2 in (
        ([constant] * 7, numbers, 0.0),
        ([constant] * 7, [constant] * 7, 1.0),
        (numbers, [constant] * 7, sklearn.r2_score(numbers, [constant] * 7)),
    ):
        judged = values(regression(gold, predicted))
        assert judged["pearson"] == judged["spearman"] == 0 and judged["r2"] == pytest.approx(r2)


def test_regression_is_judged_by_its_error():
    judged = regression([1.0], [3.0])
    assert judged.main == "mse" and judged.lower_is_better
    assert values(judged) == {"mse": 4, "mae": 2, "pearson": 0, "spearman": 0, "r2": 0}
    empty = regression([], [])
    assert empty.rows == 0 and all(math.isnan(score.value) for score in empty.scores.values())


def test_perplexity_is_of_tokens_not_of_rows():
    judged = perplexity([2.0, 30.0, 0.0], [2, 10, 0])
    assert judged.scores["loss"].value == pytest.approx(32 / 12)
    assert judged.scores["perplexity"].value == pytest.approx(math.exp(32 / 12))
    assert judged.scores["perplexity"].low == pytest.approx(math.e)
    assert judged.scores["perplexity"].high == pytest.approx(math.exp(3))
    assert judged.main == "perplexity" and judged.lower_is_better and judged.rows == 3


def test_perplexity_of_no_tokens_is_unknown_and_beyond_numbers_infinite():
    assert math.isnan(perplexity([0.0, 0.0], [0, 0]).scores["perplexity"].value)
    assert math.isnan(perplexity([], []).scores["perplexity"].value)
    assert perplexity([2000.0], [1]).scores["perplexity"].value == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regression([1.0, 2.0], [1.0, math.nan]), "predicted of row 2 is nan; expected a finite number"),
        (lambda: regression([math.inf], [1.0]), "gold of row 1 is inf"),
        (lambda: regression([1.0], []), "got gold 1, predicted 0"),
        (
            lambda: regression([[1.0, 2.0], [1.0]], [0.0, 0.0]),
            "gold must hold a number for each row, or as many in each",
        ),
        (lambda: regression([[1.0, 2.0]], [0.0]), "gold has 2 numbers in each row, predicted 1"),
        (lambda: regression([[1.0, 2.0]], [[0.0, 1.0]], ["a"]), "1 names of outputs for the 2 numbers of each row"),
        (lambda: perplexity([1.0, math.nan], [1, 1]), "nll of row 2 is nan; expected a finite number >= 0"),
        (lambda: perplexity([1.0], [-1]), "tokens of row 1 is -1.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
