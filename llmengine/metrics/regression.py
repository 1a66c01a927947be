"""Numbers beside numbers: errors, correlations, and the share of the variance that is explained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmengine.metrics.score import Judgement, bootstrap, check_paired, ratio


def regression(
    gold: Sequence[float] | Sequence[Sequence[float]], predicted: Sequence[float] | Sequence[Sequence[float]]
) -> Judgement:
    """mse (the main score; lower is better), mae, pearson, spearman (ties have their mean rank) and r2.

    mse is what training lowers, and sees answers that are all too large or on another scale, as correlations do not.
    Rows of several numbers, as many in each, are scored over all their numbers, and resampled as rows.
    Where one side is constant, pearson and spearman are 0; where gold is, r2 is 1 for exact answers and otherwise 0.
    """
    check_paired("regression", gold=gold, predicted=predicted)
    rows_of_x, rows_of_y = _numbers("gold", gold), _numbers("predicted", predicted)
    each = rows_of_x.shape[1]
    if rows_of_y.shape[1] != each and len(gold):
        raise ValueError(f"regression: gold has {each} numbers in each row, predicted {rows_of_y.shape[1]}")
    x, y = rows_of_x.flatten(), rows_of_y.flatten()
    x_order, y_order = _Ranks(x), _Ranks(y)
    # correlations and r2 do not change with the origin, and sums of squares are exact near it
    origin = x.mean() if len(x) else 0.0
    moved, error = x - origin, y - x

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights.repeat(each, axis=-1)
        rows = weights.sum(-1)
        squares = weights @ error**2
        variance = weights @ moved**2 - ratio((weights @ moved) ** 2, rows)
        return {
            "mse": ratio(squares, rows),
            "mae": ratio(weights @ np.abs(error), rows),
            "pearson": _correlation(weights, x[None], y[None]),
            "spearman": _correlation(weights, x_order(weights), y_order(weights)),
            "r2": np.where(_constant(weights, x[None]), squares == 0, 1 - ratio(squares, variance)),
        }

    scores = bootstrap(np.arange(len(gold)), metrics)
    return Judgement(scores, "mse", len(gold), lower_is_better=True)


def _correlation(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """weights (draws, rows), x and y (draws or 1, rows) -> (draws,), 0 where x or y is constant."""
    undefined = _constant(weights, x) | _constant(weights, y)
    rows = weights.sum(-1, keepdims=True)
    x, y = (side - ratio((weights * side).sum(-1, keepdims=True), rows) for side in (x, y))
    xx, yy, xy = ((weights * a * b).sum(-1) for a, b in ((x, x), (y, y), (x, y)))
    return np.where(undefined, 0.0, np.clip(ratio(xy, np.sqrt(xx) * np.sqrt(yy)), -1.0, 1.0))


def _constant(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(draws,): whether the drawn of x are all equal. Their variance does not tell: it is rounded."""
    drawn = weights > 0
    lowest, highest = np.where(drawn, x, np.inf).min(-1, initial=np.inf), np.where(drawn, x, -np.inf)
    return lowest >= highest.max(-1, initial=-np.inf)


class _Ranks:
    """The ranks of numbers (rows,) in a resample; equal numbers share the mean of theirs."""

    def __init__(self, numbers: np.ndarray) -> None:
        distinct, self.place = np.unique(numbers, return_inverse=True)
        self.distinct = len(distinct)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """weights (draws, rows) -> (draws, rows)."""
        times = np.stack([np.bincount(self.place, draw, self.distinct) for draw in weights])
        mean_rank = times.cumsum(-1) - (times - 1) / 2
        return mean_rank[:, self.place]


def _numbers(name: str, column: Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    """(rows, numbers of each)."""
    try:
        numbers = np.asarray(column, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"regression: {name} must hold a number for each row, or as many in each") from None
    numbers = numbers.reshape(-1, 1) if numbers.ndim == 1 else numbers
    if (wrong := np.flatnonzero(~np.isfinite(numbers).all(1))).size:
        raise ValueError(f"regression: {name} of row {wrong[0] + 1} is {column[wrong[0]]}; expected a finite number")
    return numbers
