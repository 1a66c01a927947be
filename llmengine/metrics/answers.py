"""Answers beside those of annotators, as SQuAD judges them (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llmengine.metrics.characters import CJK
from llmengine.metrics.score import Judgement, Table, check_paired, intervals, ratio

ARTICLES, ASCII_PUNCTUATION = re.compile(r"\b(a|an|the)\b"), str.maketrans("", "", string.punctuation)


def answers(gold: Sequence[Sequence[str]], predicted: Sequence[str]) -> Judgement:
    """f1 (the main score) and exact_match, each the best over a question's gold answers.

    gold: the right answers of each question; none, or "", where the text has none, and then only "" is right
    (SQuAD 2.0, whose script this equals). Text is compared in lower case, without punctuation and articles.

    Chinese and Japanese: where a question's gold answers or its prediction hold such characters, each of them is
    a token, so that f1 is of characters, and punctuation is Unicode's (as MLQA's script does, Lewis et al. 2020).
    """
    check_paired("answers", gold=gold, predicted=predicted)
    if (text := next((row for row in gold if isinstance(row, str)), None)) is not None:
        raise ValueError(f"answers: gold answers are a list for each question, got the string {text!r}")
    rows = [exact_and_f1(texts, text) for texts, text in zip(gold, predicted, strict=True)]
    counts = np.array([[exact, f1, 1.0] for exact, f1, _ in rows]).reshape(-1, 3)
    scores = intervals(
        counts,
        {"f1": lambda sums: sums[..., 1] / sums[..., 2], "exact_match": lambda sums: sums[..., 0] / sums[..., 2]},
    )
    answerable = np.array([has_answer for *_, has_answer in rows], bool)
    tables = () if answerable.all() else (_by_kind(counts, answerable),)
    return Judgement(scores, "f1", len(rows), tables=tables)


def _by_kind(counts: np.ndarray, answerable: np.ndarray) -> Table:
    rows: list[tuple[str | float, ...]] = []
    for name, chosen in (("with an answer", answerable), ("without", ~answerable)):
        exact, f1, number = counts[chosen].sum(0)
        rows.append((name, float(ratio(f1, number)), float(ratio(exact, number)), int(number)))
    return Table("Questions", ("question", "F1", "exact match", "rows"), tuple(rows))


def exact_and_f1(gold: Sequence[str], predicted: str) -> tuple[float, float, bool]:
    """Of one question: exact match, F1, and whether it has an answer."""
    in_characters = any(CJK.search(text) for text in (*gold, predicted))
    right = [found for text in gold if (found := tokens(text, in_characters))]
    given = tokens(predicted, in_characters)
    candidates = right or [[]]
    return float(given in candidates), max(_f1(found, given) for found in candidates), bool(right)


def _f1(right: list[str], given: list[str]) -> float:
    if not right or not given:
        return float(right == given)
    common = sum((Counter(right) & Counter(given)).values())
    return 2 * common / (len(right) + len(given))


def tokens(text: str, in_characters: bool = False) -> list[str]:
    """The words that are compared; in_characters: of Chinese and Japanese, the characters."""
    text = text.lower().translate(ASCII_PUNCTUATION)
    if in_characters:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        text = CJK.sub(r" \g<0> ", text)
    return ARTICLES.sub(" ", text).split()
