"""The rows that a model is most wrong about, whatever kind of answer it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmengine.metrics.answers import exact_and_f1
from llmengine.metrics.texts import chrf
from llmengine.tasks import Answer, Row

NONE = "(no answer)"
Wrong = tuple[str, str, float]  # the right answer, the given one, how wrong it is


@dataclass(frozen=True)
class Kind:
    """title: of a list of mistakes; measure: what the number that they are ordered by is, the worst first."""

    title: str
    measure: str
    find: Callable[[Row, Any], Wrong | None]
    highest_first: bool = True


@dataclass(frozen=True)
class Mistake:
    row: int
    right: str
    given: str
    measure: float


def mistakes(rows: Sequence[Row], answers: Sequence[Answer]) -> tuple[Kind, list[Mistake]]:
    """All mistakes, the worst first. Raises ValueError for no answers, and for those that no task gives."""
    kind = _kind(answers)
    found = []
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        if (wrong := kind.find(row, answer)) is not None:
            found.append(Mistake(i, *wrong))
    sign = -1 if kind.highest_first else 1
    return kind, sorted(found, key=lambda mistake: (sign * mistake.measure, mistake.row))


def _kind(answers: Sequence[Answer]) -> Kind:
    for name, kind in KINDS.items():
        if answers and name in answers[0]:
            return kind
    given = f"{{{', '.join(answers[0])}}}" if answers else "none"
    raise ValueError(f"mistakes: an answer has one of {', '.join(KINDS)}; got {given}")


# ---- kinds of answers ------------------------------------------------------------------------------------------------


def _label(row: Row, answer: Answer) -> Wrong | None:
    right, given = str(row["label"]), answer["label"]
    return None if given == right else (right, given, answer["scores"][given])


def _labels(row: Row, answer: Answer) -> Wrong | None:
    """By the probability that the surest of the wrong decisions has; a label that the model does not know is one."""
    right, given, scores = set(map(str, row["label"])), set(answer["labels"]), answer["scores"]
    if right == given:
        return None
    sure = max(scores[label] if label in given else 1 - scores.get(label, 0.0) for label in right ^ given)
    return ", ".join(sorted(right)), ", ".join(sorted(given)), sure


def _value(row: Row, answer: Answer) -> Wrong | None:
    """One number, or several: their mean error."""
    right, given = (np.atleast_1d(np.asarray(values, np.float64)) for values in (row["label"], answer["value"]))
    if (right == given).all():
        return None
    shown = (", ".join(f"{x:.4g}" for x in values) for values in (right, given))
    return next(shown), next(shown), float(np.abs(right - given).mean())


def _tags(row: Row, answer: Answer) -> Wrong | None:
    """Only the wrong words are told."""
    trio = zip(row["words"], row["tags"], answer["tags"], strict=True)
    wrong = [(word, right, given) for word, right, given in trio if right != given]
    if not wrong:
        return None
    right, given = (" ".join(f"{each[0]}/{each[i]}" for each in wrong) for i in (1, 2))
    return right, given, len(wrong)


def _choice(row: Row, answer: Answer) -> Wrong | None:
    choices, given = row["choices"], answer["choice"]
    return None if given == row["label"] else (choices[row["label"]], choices[given], answer["scores"][given])


def _extract(row: Row, answer: Answer) -> Wrong | None:
    right = row["answers"]["text"]
    exact, _, _ = exact_and_f1(right, answer["answer"])
    if exact:
        return None
    return " / ".join(dict.fromkeys(right)) or NONE, answer["answer"] or NONE, answer["score"]


def _text(row: Row, answer: Answer) -> Wrong | None:
    right, given = reference(row), answer["text"]
    return None if right is None or given.split() == right.split() else (right, given, chrf(given, [right]))


def reference(row: Row) -> str | None:
    """What a text is to be; None: a conversation that ends without a reply, which nothing judges."""
    if "messages" in row:
        last = row["messages"][-1]
        return last["content"] if last["role"] == "assistant" else None
    return row["target"] if "target" in row else row.get("response")


def _preference(row: Row, answer: Answer) -> Wrong | None:
    return None if answer["chosen"] else (row["chosen"], row["rejected"], answer["margin"])


SURE = "Most confident mistakes"
KINDS = {
    "label": Kind(SURE, "probability", _label),
    "labels": Kind(SURE, "probability", _labels),
    "choice": Kind(SURE, "probability", _choice),
    "answer": Kind(SURE, "score", _extract),
    "value": Kind("Largest errors", "error", _value),
    "tags": Kind("Sentences with most mistakes", "wrong words", _tags),
    "text": Kind("Texts farthest from the reference", "chrF", _text, highest_first=False),
    "margin": Kind(SURE, "margin", _preference, highest_first=False),
}
