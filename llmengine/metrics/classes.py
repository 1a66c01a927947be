"""One class per row, or several: F1 and its relatives, of how often each class is right, predicted and present."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmengine.metrics.score import Confusion, Judgement, Table, bootstrap, check_paired, f1, f1_table, ratio

MOST_CLASSES = 1000  # of a confusion matrix: beyond, nobody reads it and its memory grows with the square
Pair = tuple[tuple[int, ...], tuple[int, ...]]


def classification(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Judgement:
    """accuracy (the main score), macro_f1, weighted_f1 and mcc, a table of the classes, and the confusion matrix.

    labels: all classes that the model knows. As scikit-learn computes them: macro_f1 is the mean over the classes that
    occur in gold or predicted, weighted_f1 weights by the rows of gold; a precision, recall or F1 of nothing is 0
    (zero_division=0). mcc is Matthews' correlation for any number of classes (Gorodkin 2004), 0 where undefined.
    """
    check_paired("classification", gold=gold, predicted=predicted)
    index = _index("classification", labels)
    pairs: list[Pair] = [
        ((a,), (b,))
        for a, b in zip(
            _ids("classification: gold", gold, index), _ids("classification: predicted", predicted, index), strict=True
        )
    ]
    counts = _Counts.of(pairs, len(labels))

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        right, given, present = counts.sums(weights)
        each, rows = f1(right, given, present), weights.sum(-1)
        return {
            "accuracy": ratio(right.sum(-1), rows),
            "macro_f1": ratio(each.sum(-1), (given + present > 0).sum(-1)),
            "weighted_f1": ratio((each * present).sum(-1), rows),
            "mcc": _mcc(right.sum(-1), given, present, rows),
        }

    scores = bootstrap(counts.kinds, metrics)
    confusion = None
    if len(labels) <= MOST_CLASSES:
        cells = np.array([len(labels) * a + b for (a,), (b,) in pairs], np.int64)
        square = np.bincount(cells, minlength=len(labels) ** 2).reshape(len(labels), len(labels))
        confusion = Confusion(tuple(labels), square)
    return Judgement(scores, "accuracy", len(gold), tables=(counts.table("Classes", labels),), confusion=confusion)


def multi_label(
    gold: Sequence[Collection[str]], predicted: Sequence[Collection[str]], labels: Sequence[str]
) -> Judgement:
    """micro_f1 (the main score), macro_f1, exact (rows whose set of labels is right), and a table of the labels.

    As scikit-learn computes them of indicator matrices with a column for each of `labels`: macro_f1 is the mean over
    all labels, and the F1 of one that is neither present nor predicted is 0 (zero_division=0).
    """
    check_paired("multi_label", gold=gold, predicted=predicted)
    index = _index("multi_label", labels)
    pairs: list[Pair] = list(
        zip(_sets("multi_label: gold", gold, index), _sets("multi_label: predicted", predicted, index), strict=True)
    )
    counts = _Counts.of(pairs, len(labels))
    exact = np.array([a == b for a, b in dict.fromkeys(pairs)], bool)

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        right, given, present = counts.sums(weights)
        return {
            "micro_f1": f1(right.sum(-1), given.sum(-1), present.sum(-1)),
            "macro_f1": f1(right, given, present).mean(-1),
            "exact": ratio(weights[:, exact].sum(-1), weights.sum(-1)),
        }

    scores = bootstrap(counts.kinds, metrics)
    return Judgement(scores, "micro_f1", len(gold), tables=(counts.table("Labels", labels),))


def _mcc(right: np.ndarray, given: np.ndarray, present: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """right, rows (draws,); given, present (draws, classes). 0 where all rows have, or are given, the same class."""
    covariance = right * rows - (given * present).sum(-1)
    spread = (rows**2 - (given**2).sum(-1)) * (rows**2 - (present**2).sum(-1))
    return ratio(covariance, np.sqrt(spread))


# ---- counts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """How often each class is right, given, present, as sums over the distinct pairs of (present, given) classes."""

    kinds: np.ndarray
    """(rows,): which of the distinct pairs each row is."""
    entries: tuple[tuple[np.ndarray, np.ndarray], ...]
    """Of right, given and present: pairs and classes (entries,), one for each class that a pair adds to."""
    classes: int

    @classmethod
    def of(cls, pairs: Sequence[Pair], classes: int) -> _Counts:
        number = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        kinds = np.array([number[pair] for pair in pairs], np.int64)
        members = (
            [(i, c) for (present, given), i in number.items() for c in chosen(set(present), set(given))]
            for chosen in (set.intersection, lambda present, given: given, lambda present, given: present)
        )
        arrays = (np.array(found, np.int64).reshape(-1, 2).T for found in members)
        return cls(kinds, tuple((pair, of_class) for pair, of_class in arrays), classes)

    def sums(self, weights: np.ndarray) -> list[np.ndarray]:
        """weights (draws, pairs) -> right, given, present, each (draws, classes)."""
        return [
            np.stack([np.bincount(of_class, draw[pair], self.classes) for draw in weights])
            for pair, of_class in self.entries
        ]

    def table(self, title: str, labels: Sequence[str]) -> Table:
        (right,), (given,), (present,) = self.sums(np.bincount(self.kinds).astype(np.float64)[None])
        return f1_table(title, ("label", "rows"), labels, right, given, present)


def _index(what: str, labels: Sequence[str]) -> dict[str, int]:
    index = {label: i for i, label in enumerate(labels)}
    if len(index) < len(labels):
        raise ValueError(f"{what}: labels has {next(x for x in labels if labels.count(x) > 1)!r} twice")
    return index


def _ids(what: str, column: Iterable[str], index: dict[str, int]) -> list[int]:
    column = list(column)
    if unknown := sorted(set(column) - set(index), key=str):
        known = ", ".join(map(repr, list(index)[:20])) + ", …" * (len(index) > 20)
        named = ", ".join(map(repr, unknown[:20])) + ", …" * (len(unknown) > 20)
        raise ValueError(f"{what} has {named}, not among the labels: {known or 'none'}")
    return [index[label] for label in column]


def _sets(what: str, column: Sequence[Collection[str]], index: dict[str, int]) -> list[tuple[int, ...]]:
    if text := next((row for row in column if isinstance(row, str)), None):
        raise ValueError(f"{what}: a row is a collection of labels, got the string {text!r}")
    return [tuple(sorted(set(_ids(what, row, index)))) for row in column]
