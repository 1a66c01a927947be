"""Scores and their confidence intervals.

Every metric is a function of sums over rows: accuracy of (right, rows), F1 of (true positives, predicted, present),
BLEU of n-gram counts. So one bootstrap (Efron 1979) serves them all: rows are drawn with replacement, their counts
summed, and the metric taken of the sums. To draw the resamples of a million rows takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, CONFIDENCE = 1000, 0.95
BLOCK = 2**20  # weights that are held at a time: 8 MiB


@dataclass(frozen=True)
class Score:
    """A metric's value and its 95 % confidence interval over the choice of rows."""

    value: float
    low: float
    high: float


UNKNOWN = Score(float("nan"), float("nan"), float("nan"))  # of no rows


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


def bootstrap(
    kinds: np.ndarray | Sequence[int], metrics: Callable[[np.ndarray], dict[str, np.ndarray]], seed: int = 0
) -> dict[str, Score]:
    """Several metrics of the same rows, on the same 1000 resamples of them; the middle 95 % are the intervals.

    kinds (rows,): numbers from 0 on; rows that count the same may share one. metrics: the values (draws,), by name, of
    weights (draws, kinds) float64, how many rows of each kind were drawn. No rows: NaN.
    """
    kinds = np.asarray(kinds, np.int64)
    rows = len(kinds)
    if rows == 0:
        return dict.fromkeys(metrics(np.zeros((1, 0))), UNKNOWN)
    number = int(kinds.max()) + 1
    values = metrics(np.bincount(kinds, minlength=number).astype(np.float64)[None])
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in values}
    block = max(1, BLOCK // number)
    for start in range(0, RESAMPLES, block):
        draws = (kinds[generator.integers(0, rows, rows)] for _ in range(min(block, RESAMPLES - start)))
        weights = np.stack([np.bincount(draw, minlength=number) for draw in draws]).astype(np.float64)
        for name, found in metrics(weights).items():
            drawn[name].append(found)
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return {
        name: Score(float(value[0]), *map(float, np.quantile(np.concatenate(drawn[name]), tails)))
        for name, value in values.items()
    }


def interval(counts: np.ndarray | Sequence, metric: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Score:
    """counts (rows, k): what each row adds to the sums (…, k) of which `metric` gives the value (…,). No rows: NaN."""
    return intervals(counts, {"": metric}, seed)[""]


def intervals(
    counts: np.ndarray | Sequence, metrics: Mapping[str, Callable[[np.ndarray], np.ndarray]], seed: int = 0
) -> dict[str, Score]:
    """`interval` of several metrics, by name, of the same sums."""
    table = np.asarray(counts, np.float64)
    if len(table) == 0:
        return dict.fromkeys(metrics, UNKNOWN)

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        sums = weights @ table
        return {name: metric(sums) for name, metric in metrics.items()}

    return bootstrap(np.arange(len(table)), values, seed)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 0 where whole is 0, as scikit-learn's zero_division=0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), whole)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)


def f1(right: np.ndarray, predicted: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision, right / predicted, and recall, right / present; 0 where there are none."""
    return ratio(2 * right, predicted + present)


def f1_table(
    title: str,
    columns: tuple[str, str],
    names: Sequence[str],
    right: np.ndarray,
    given: np.ndarray,
    present: np.ndarray,
) -> Table:
    """Precision, recall and F1 of each name. columns: what the names are, and what `present` (names,) counts."""
    numbers = (ratio(right, given), ratio(right, present), f1(right, given, present))
    rows = zip(names, *(column.tolist() for column in numbers), present.astype(np.int64).tolist(), strict=True)
    return Table(title, (columns[0], "precision", "recall", "F1", columns[1]), tuple(rows))


def check_paired(what: str, **columns: Sequence) -> None:
    """That there is one of each for every row."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{what}: there must be as many of each, one a row; got {given}")
