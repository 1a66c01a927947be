"""Numbers beside numbers: errors, correlations, and the share of the variance that is explained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmengine.metrics.score import Judgement, Table, bootstrap, check_paired, ratio


def regression(
    gold: Sequence[float] | Sequence[Sequence[float]],
    predicted: Sequence[float] | Sequence[Sequence[float]],
    outputs: Sequence[str] | None = None,
) -> Judgement:
    """mse (the main score; lower is better), mae, pearson, spearman (ties have their mean rank) and r2.

    mse is what training lowers, and sees answers that are all too large or on another scale, as correlations do not.
    Rows may hold several numbers, as many in each: each output is scored on its own, and has a row in a table; the
    scores are means over the outputs, as scikit-learn's are. outputs: their names; None: numbers from 0.
    Where one side is constant, pearson and spearman are 0; where gold is, r2 is 1 for exact answers and otherwise 0.
    """
    check_paired("regression", gold=gold, predicted=predicted)
    x, y = _numbers("gold", gold), _numbers("predicted", predicted)
    each = x.shape[1]
    if y.shape[1] != each and len(gold):
        raise ValueError(f"regression: gold has {each} numbers in each row, predicted {y.shape[1]}")
    if outputs is not None and len(outputs) != each and len(gold):
        raise ValueError(f"regression: {len(outputs)} names of outputs for the {each} numbers of each row")
    of_outputs = [_Output(*columns) for columns in zip(x.T, y.T, strict=False)]

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = [output.metrics(weights) for output in of_outputs]
        return {name: np.mean([one[name] for one in found], 0) for name in found[0]}

    scores = bootstrap(np.arange(len(gold)), metrics)
    tables = (_table(of_outputs, outputs or list(map(str, range(each)))),) if each > 1 and len(gold) else ()
    return Judgement(scores, "mse", len(gold), lower_is_better=True, tables=tables)


class _Output:
    """One number of each row: right ones x and given ones y (rows,)."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y, self.error = x, y, y - x
        self.x_order, self.y_order = _Ranks(x), _Ranks(y)
        # correlations and r2 do not change with the origin, and sums of squares are exact near it
        self.moved = x - (x.mean() if len(x) else 0.0)

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """weights (draws, rows) -> each metric (draws,)."""
        rows = weights.sum(-1)
        squares = weights @ self.error**2
        variance = weights @ self.moved**2 - ratio((weights @ self.moved) ** 2, rows)
        return {
            "mse": ratio(squares, rows),
            "mae": ratio(weights @ np.abs(self.error), rows),
            "pearson": _correlation(weights, self.x[None], self.y[None]),
            "spearman": _correlation(weights, self.x_order(weights), self.y_order(weights)),
            "r2": np.where(_constant(weights, self.x[None]), squares == 0, 1 - ratio(squares, variance)),
        }


def _table(outputs: Sequence[_Output], names: Sequence[str]) -> Table:
    """A row of metrics for each output."""
    found = [output.metrics(np.ones((1, len(output.x)))) for output in outputs]
    rows: list[tuple[str | float, ...]] = []
    for name, each in zip(names, found, strict=True):
        rows.append((name, *(float(value[0]) for value in each.values())))
    return Table("Outputs", ("output", *found[0]), tuple(rows))


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
