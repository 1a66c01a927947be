"""What tasks ask of rows: columns that are there and hold what they should. `place` is a row's: its file and line, or,
where it comes from no file, its number."""

from __future__ import annotations

import reprlib
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from numbers import Integral
from typing import Any

from llmengine.data.textfiles import SURROGATE
from llmengine.tasks.task import Row

SHOWN = 5  # of names that are told


def placed(rows: Iterable[Row], first: int = 0) -> list[tuple[str, Row]]:
    """Rows with their places: where they were read; of those that do not know, their numbers. first: that of the first
    row, from 0; people count from 1."""
    return [(getattr(row, "place", None) or f"row {number}", row) for number, row in enumerate(rows, first + 1)]


def value_of(task: str, row: Row, place: str, column: str) -> Any:
    """A row's column."""
    if column not in row:
        raise ValueError(f"task {task!r}: {place} has no {column!r}; its columns: {', '.join(map(str, row))}")
    return row[column]


def text_of(task: str, row: Row, place: str, column: str) -> str:
    """A row's column, which must be a text."""
    text = value_of(task, row, place, column)
    if not isinstance(text, str):
        raise wrong(task, place, column, text, "a text")
    check_characters(task, place, column, text)
    return text


def texts_of(task: str, row: Row, place: str, column: str) -> list[str]:
    """A row's column, which must be a list of texts."""
    texts = value_of(task, row, place, column)
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise wrong(task, place, column, texts, "a list of texts")
    for text in texts:
        check_characters(task, place, column, text)
    return list(texts)


def check_characters(task: str, place: str, column: str, text: str) -> None:
    """That a tokenizer can read a text: Python's strings may hold half a surrogate pair, UTF-8 may not."""
    if not text.isascii() and SURROGATE.search(text):
        raise wrong(task, place, column, text, "a text without half surrogate pairs")


def integer(value: Any) -> int | None:
    """A whole number as an int; None: it is none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def wrong(task: str, place: str, column: str, given: Any, expected: str) -> ValueError:
    """The error of a row that holds something else."""
    return ValueError(f"task {task!r}: {place}: {column} is {reprlib.repr(given)}; expected {expected}")


def tell(task: str, count: int, rows: int, what: str) -> None:
    """Warns that something happened to so many of the rows."""
    if count:
        warnings.warn(f"task {task!r}: {count} of {rows} {what}", stacklevel=3)


def tell_unknown(task: str, what: str, known: Container[str], given: Sequence[Iterable[str]], then: str) -> None:
    """Warns of names that the model does not know: in how many of the rows, whose names are `given`, and how often."""
    counts = Counter(name for names in given for name in names if name not in known)
    most = ", ".join(f"{name!r}: {count}" for name, count in counts.most_common(SHOWN))
    more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    rows = sum(not counts.keys().isdisjoint(names) for names in given)
    tell(task, rows, len(given), f"rows have a {what} that the model does not know ({most}{more}): {then}")
