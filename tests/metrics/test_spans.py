"""Spans beside seqeval, which is tested beside conlleval."""

from __future__ import annotations

import math
import warnings

import pytest
import seqeval.metrics
import sklearn.metrics as sklearn
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine.metrics import spans, tags
from llmengine.metrics.spans import spans_of

TAGS = ["O", "B", "I", *(f"{place}-{kind}" for place in "BIES" for kind in ("PER", "LOC", "ORG-X", ""))]
sentence = st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=8)


def values(judgement) -> dict[str, float]:
    return {name: score.value for name, score in judgement.scores.items()}


@settings(max_examples=150)
@given(st.lists(sentence, min_size=1, max_size=6))
def test_spans_are_seqevals(sentences):
    gold, predicted = ([[pair[side] for pair in row] for row in sentences] for side in (0, 1))
    judged = spans(gold, predicted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            f"span_{name}": getattr(seqeval.metrics, f"{name}_score")(gold, predicted, zero_division=0)
            for name in ("f1", "precision", "recall")
        }
        words = sum(map(len, gold))
        expected["token_accuracy"] = seqeval.metrics.accuracy_score(gold, predicted) if words else 0.0
        report = seqeval.metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    assert values(judged) == pytest.approx(expected, abs=1e-12)
    types = {name: row for name, row in report.items() if not name.endswith(" avg")}
    assert [row[0] for row in judged.tables[0].rows] == sorted(types)
    for name, *numbers in judged.tables[0].rows:
        row = types[name]
        assert numbers == pytest.approx([row["precision"], row["recall"], row["f1-score"], row["support"]], abs=1e-12)


def test_a_span_is_right_when_type_and_both_ends_are():
    gold = [["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]]
    judged = spans(gold, [["B-PER", "O", "O", "B-LOC", "B-ORG"]])
    assert values(judged) == {
        "span_f1": pytest.approx(1 / 3), "span_precision": pytest.approx(1 / 3), "span_recall": pytest.approx(1 / 3),
        "token_accuracy": pytest.approx(3 / 5),
    }  # fmt: skip
    assert judged.main == "span_f1"


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ("I-A I-A O", {("A", 0, 1)}),
        ("B-A I-B", {("A", 0, 0), ("B", 1, 1)}),
        ("B-A B-A", {("A", 0, 0), ("A", 1, 1)}),
        ("B-A M-A E-A S-A", {("A", 0, 2), ("A", 3, 3)}),
        ("B-A L-A U-A U-A", {("A", 0, 1), ("A", 2, 2), ("A", 3, 3)}),
        ("B M E S O", {("_", 0, 2), ("_", 3, 3)}),
        ("", set()),
    ],
)
def test_schemes(sequence, expected):
    assert spans_of(sequence.split()) == expected


def test_no_rows_no_words_and_no_spans():
    judged = spans([], [])
    assert judged.rows == 0 and all(math.isnan(score.value) for score in judged.scores.values())
    assert set(values(spans([[]], [[]])).values()) == {0.0}
    nothing = spans([["O", "O"]], [["O", "O"]])
    assert values(nothing) == {"span_f1": 0, "span_precision": 0, "span_recall": 0, "token_accuracy": 1}
    assert nothing.tables[0].rows == ()


def test_tags_are_scikit_learns():
    gold, predicted = [["DET", "NOUN"], ["VERB", "NOUN", "ADV"]], [["DET", "VERB"], ["VERB", "NOUN", "DET"]]
    judged = tags(gold, predicted)
    flat, guessed = [*gold[0], *gold[1]], [*predicted[0], *predicted[1]]
    assert values(judged) == {"token_accuracy": sklearn.accuracy_score(flat, guessed)} and judged.rows == 2
    names = sorted(set(flat))
    table = sklearn.precision_recall_fscore_support(flat, guessed, labels=names, zero_division=0)
    assert [row[0] for row in judged.tables[0].rows] == names
    for row, expected in zip(judged.tables[0].rows, zip(*table, strict=True), strict=True):
        assert row[1:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spans([["O"], ["O", "O"]], [["O"], ["O"]]), "row 2 has 2 tags, and 1 are predicted"),
        (lambda: spans([["NOUN"]], [["O"]]), "the tag 'NOUN' is neither 'O' nor B-"),
        (lambda: spans([["O"]], [["X-PER"]]), "the tag 'X-PER' is neither"),
        (lambda: spans([["O"]], []), "got gold 1, predicted 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
