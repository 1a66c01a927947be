"""Tagged words: spans such as names, as CoNLL's conlleval counts them, or each tag by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from llmengine.metrics.score import Judgement, Table, check_paired, f1, f1_table, intervals, ratio

# Begin, inside, end, single: those of BIO, IOBES, BILOU and BMES
PLACES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}
Span = tuple[str, int, int]  # its type, its first word, its last


def spans(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Judgement:
    """span_f1 (the main score), span_precision, span_recall, over the spans of all types; and token_accuracy.

    Tags are "O" or a place and a type, "B-PER": BIO, IOBES, BILOU or BMES. A span is right when its type and
    both its ends are. What a scheme forbids still counts, as in conlleval and seqeval's default mode: an "I-X" that
    continues no "X" begins one. A precision, recall or F1 of nothing is 0. Each type has a row in the table.
    """
    tally, counts = _Tally(), []
    for a, b in _sequences("spans", gold, predicted):
        of_gold, of_predicted = spans_of(a), spans_of(b)
        both = of_gold & of_predicted
        tally.add(*([kind for kind, _, _ in found] for found in (both, of_predicted, of_gold)))
        counts.append((len(both), len(of_predicted), len(of_gold), *_agreement(a, b)))
    scores = intervals(
        np.array(counts).reshape(-1, 5),
        {
            "span_f1": lambda sums: f1(sums[..., 0], sums[..., 1], sums[..., 2]),
            "span_precision": lambda sums: ratio(sums[..., 0], sums[..., 1]),
            "span_recall": lambda sums: ratio(sums[..., 0], sums[..., 2]),
            "token_accuracy": lambda sums: ratio(sums[..., 3], sums[..., 4]),
        },
    )
    return Judgement(scores, "span_f1", len(counts), tables=(tally.table("Spans", ("type", "spans")),))


def tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Judgement:
    """token_accuracy (the main score), for tags that are no spans, such as parts of speech; a table of the tags."""
    tally, counts = _Tally(), []
    for a, b in _sequences("tags", gold, predicted):
        tally.add((tag for tag, other in zip(a, b, strict=True) if tag == other), b, a)
        counts.append(_agreement(a, b))
    scores = intervals(
        np.array(counts).reshape(-1, 2), {"token_accuracy": lambda sums: ratio(sums[..., 0], sums[..., 1])}
    )
    return Judgement(scores, "token_accuracy", len(counts), tables=(tally.table("Tags", ("tag", "words")),))


class _Tally:
    """How often each kind is right, given and present."""

    def __init__(self) -> None:
        self.counters: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())

    def add(self, *found: Iterable[str]) -> None:
        for counter, kinds in zip(self.counters, found, strict=True):
            counter.update(kinds)

    def table(self, title: str, columns: tuple[str, str]) -> Table:
        right, given, present = self.counters
        names = sorted(given.keys() | present.keys())
        arrays = (np.array([counter[name] for name in names], np.float64) for counter in (right, given, present))
        return f1_table(title, columns, names, *arrays)


def is_of_spans(tag: str) -> bool:
    """Whether a tag is one of `spans`."""
    return tag == "O" or tag in PLACES or (tag[:1] in PLACES and tag[1:2] == "-")


def spans_of(sequence: Sequence[str]) -> set[Span]:
    """The spans of tags. Raises ValueError for a tag that `is_of_spans` does not know."""
    found: set[Span] = set()
    start, before, kind_before = 0, "O", ""
    for i, tag in enumerate([*sequence, "O"]):
        if not is_of_spans(tag):
            raise ValueError(f"spans: the tag {tag!r} is neither 'O' nor B-, I-, E-, S-, M-, L- or U- and a type")
        place, kind = PLACES.get(tag[:1], "O"), tag[2:] or "_"
        goes_on = place in "IE" and before in "BI" and kind == kind_before
        if not goes_on:
            if before != "O":
                found.add((kind_before, start, i - 1))
            start = i
        before, kind_before = place, kind
    return found


def _sequences(
    what: str, gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> list[tuple[Sequence[str], Sequence[str]]]:
    check_paired(what, gold=gold, predicted=predicted)
    for i, (a, b) in enumerate(zip(gold, predicted, strict=True)):
        if len(a) != len(b):
            raise ValueError(f"{what}: row {i + 1} has {len(a)} tags, and {len(b)} are predicted; each word has one")
    return list(zip(gold, predicted, strict=True))


def _agreement(a: Sequence[str], b: Sequence[str]) -> tuple[int, int]:
    """Right tags, and tags."""
    return sum(tag == other for tag, other in zip(a, b, strict=True)), len(a)
