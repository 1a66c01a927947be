"""Classification beside scikit-learn."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics as sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import MultiLabelBinarizer

from llmengine.metrics import classification, multi_label

LABELS = ("anger", "fear", "joy", "快乐")
of_labels = st.sampled_from(LABELS)


def values(judgement) -> dict[str, float]:
    for score in judgement.scores.values():
        assert score.low <= score.high and not math.isnan(score.low + score.value + score.high)
    return {name: score.value for name, score in judgement.scores.items()}


@settings(max_examples=60)
@given(st.lists(st.tuples(of_labels, of_labels), min_size=1, max_size=30))
def test_classification_is_scikit_learns(pairs):
    gold, predicted = map(list, zip(*pairs, strict=True))
    judged = classification(gold, predicted, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class alone
        expected = {
            "accuracy": sklearn.accuracy_score(gold, predicted),
            "macro_f1": sklearn.f1_score(gold, predicted, average="macro", zero_division=0),
            "weighted_f1": sklearn.f1_score(gold, predicted, average="weighted", zero_division=0),
            "mcc": sklearn.matthews_corrcoef(gold, predicted),
        }
        table = sklearn.precision_recall_fscore_support(gold, predicted, labels=LABELS, zero_division=0)
        confusion = sklearn.confusion_matrix(gold, predicted, labels=LABELS)
    assert values(judged) == pytest.approx(expected, abs=1e-12)
    assert judged.main == "accuracy" and judged.rows == len(pairs) and not judged.lower_is_better
    assert [row[0] for row in judged.tables[0].rows] == list(LABELS)
    numbers = [row[1:] for row in judged.tables[0].rows]
    assert np.array(numbers, float) == pytest.approx(np.array(table, float).T, abs=1e-12)
    assert (judged.confusion.counts == confusion).all() and judged.confusion.labels == LABELS


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sets(of_labels), st.sets(of_labels)), min_size=1, max_size=30))
def test_multi_label_is_scikit_learns(pairs):
    gold, predicted = map(list, zip(*pairs, strict=True))
    judged = multi_label(gold, [sorted(row, reverse=True) for row in predicted], LABELS)
    columns = MultiLabelBinarizer(classes=LABELS)
    a, b = columns.fit_transform(gold), columns.transform(predicted)
    expected = {
        "micro_f1": sklearn.f1_score(a, b, average="micro", zero_division=0),
        "macro_f1": sklearn.f1_score(a, b, average="macro", zero_division=0),
        "exact": sklearn.accuracy_score(a, b),
    }
    table = sklearn.precision_recall_fscore_support(a, b, zero_division=0)
    assert values(judged) == pytest.approx(expected, abs=1e-12)
    numbers = [row[1:] for row in judged.tables[0].rows]
    assert np.array(numbers, float) == pytest.approx(np.array(table, float).T, abs=1e-12)
    assert judged.main == "micro_f1" and judged.confusion is None


def test_intervals_are_those_of_resampled_rows():
    """Beside scikit-learn on the very rows that the bootstrap draws."""
    generator = np.random.default_rng(3)
    gold = np.array(LABELS)[generator.integers(0, 4, 60)]
    predicted = np.where(generator.random(60) < 0.6, gold, np.array(LABELS)[generator.integers(0, 4, 60)])
    judged = classification(gold.tolist(), predicted.tolist(), LABELS)
    draws = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = draws.integers(0, 60, 60)
        drawn.append(sklearn.f1_score(gold[rows], predicted[rows], average="macro"))
    score = judged.scores["macro_f1"]
    assert (score.low, score.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-12)


def test_ten_thousand_rows_of_two_hundred_classes_take_little_memory():
    import tracemalloc

    labels = [f"class {i}" for i in range(200)]
    generator = np.random.default_rng(1)
    gold, predicted = ([labels[i] for i in generator.integers(0, 200, 10_000)] for _ in range(2))
    tracemalloc.start()
    judged = classification(gold, predicted, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert judged.scores["accuracy"].value == sklearn.accuracy_score(gold, predicted)
    assert judged.scores["macro_f1"].value == pytest.approx(sklearn.f1_score(gold, predicted, average="macro"))


@pytest.mark.parametrize("judge", [classification, multi_label])
def test_no_rows_have_no_scores(judge):
    judged = judge([], [], LABELS)
    assert judged.rows == 0 and all(math.isnan(score.value) for score in judged.scores.values())
    assert [row[-1] for row in judged.tables[0].rows] == [0, 0, 0, 0]


def test_one_class_alone():
    judged = classification(["a"] * 5, ["a"] * 5, ["a"])
    assert values(judged) == {"accuracy": 1, "macro_f1": 1, "weighted_f1": 1, "mcc": 0}
    assert judged.confusion.counts.tolist() == [[5]]


def test_labels_of_nothing():
    judged = multi_label([[], []], [[], []], LABELS)
    assert values(judged) == {"micro_f1": 0, "macro_f1": 0, "exact": 1}


def test_a_matrix_of_too_many_classes_is_not_made():
    labels = [str(i) for i in range(1001)]
    assert classification(["1000", "3"], ["1000", "4"], labels).confusion is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification(["a", "d"], ["a", "b"], "abc"), "gold has 'd', not among the labels: 'a', 'b', 'c'"),
        (lambda: classification(["a", "b"], ["e", "d"], "abc"), "predicted has 'd', 'e', not among the labels"),
        (lambda: classification(["a"], ["a", "b"], "ab"), "got gold 1, predicted 2"),
        (lambda: classification(["a"], ["a"], "aba"), "labels has 'a' twice"),
        (lambda: multi_label([["a", "z"]], [["a"]], "abc"), "gold has 'z', not among the labels"),
        (lambda: multi_label(["ab"], [["a"]], "abc"), "collection of labels, got the string 'ab'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
