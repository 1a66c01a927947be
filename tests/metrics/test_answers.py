"""Answers by hand: nobody publishes SQuAD's script as a package."""

from __future__ import annotations

import math

import pytest

from llmengine.metrics import answers
from llmengine.metrics.answers import tokens


def judged(gold: list[str], predicted: str) -> tuple[float, float]:
    scores = answers([gold], [predicted]).scores
    return scores["exact_match"].value, scores["f1"].value


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (["The Normans"], "normans", 1, 1),
        (["10th and 11th centuries"], "in the 10th and 11th centuries", 0, 8 / 9),
        (["Denmark, Iceland and Norway"], "Denmark", 0, 2 / 5),
        (["one", "one of two"], "one of two!", 1, 1),
        (["a b c"], "b b b", 0, 2 / 5),  # the article is nothing; b counts once
        (["U.S. dollar's"], "us dollars", 1, 1),  # punctuation leaves no gap
        (["well-known"], "well known", 0, 0),
        (["another"], "an other", 0, 0),  # articles are whole words
        (["«Ab»"], "Ab", 0, 0),  # the script removes ASCII's punctuation only
        (["  two   spaces "], "two spaces", 1, 1),
        ([], "", 1, 1),
        ([""], "", 1, 1),
        ([], "the", 1, 1),  # nothing is left of an article
        ([], "Paris", 0, 0),
        (["Paris"], "", 0, 0),
        (["the", "Paris"], "", 0, 0),  # a gold answer of which nothing is left is none
        (["the"], "a", 1, 1),
        (["北京大学"], "北京", 0, 2 / 3),
        (["北京大学", "北大"], "北大", 1, 1),
        (["《红楼梦》。"], "红楼梦", 1, 1),
        (["1937年7月7日"], "1937 年 7 月 7 日", 1, 1),
        (["iPhone手机"], "iPhone 15手机", 0, 6 / 7),
        (["“ABC”公司"], "ABC公司", 1, 1),
        (["とうきょう"], "きょうと", 0, 2 * 4 / 9),
    ],
)
def test_by_hand(gold, predicted, exact, f1):
    assert judged(gold, predicted) == pytest.approx((exact, f1))


def test_only_chinese_is_cut_into_characters():
    assert tokens("The 北京 U.S. café,") == ["北京", "us", "café"]
    assert tokens("The 北京 U.S. café，", in_characters=True) == ["北", "京", "us", "café"]


def test_questions_without_answer_have_their_own_row():
    judged = answers([["Paris"], ["the Rhine"], [], []], ["Paris", "Rhine valley", "", "Rome"])
    assert judged.main == "f1" and judged.rows == 4
    assert judged.scores["f1"].value == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert judged.scores["exact_match"].value == 0.5
    assert judged.tables[0].rows == (
        ("with an answer", pytest.approx(5 / 6), 0.5, 2),
        ("without", 0.5, 0.5, 2),
    )
    assert answers([["x"]], ["x"]).tables == ()


def test_no_rows_have_no_scores():
    judged = answers([], [])
    assert judged.rows == 0 and all(math.isnan(score.value) for score in judged.scores.values())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="gold answers are a list for each question, got the string 'Paris'"):
        answers(["Paris"], ["Paris"])
    with pytest.raises(ValueError, match="got gold 1, predicted 2"):
        answers([["Paris"]], ["Paris", "Rome"])
