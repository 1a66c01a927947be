"""What tasks ask of rows: columns that are there and hold what they should. `number` is a row's, from 0; people count
from 1."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from llmengine.data.textfiles import SURROGATE
from llmengine.tasks.task import Row


def value_of(task: str, row: Row, number: int, column: str) -> Any:
    """A row's column."""
    if column not in row:
        raise ValueError(f"task {task!r}: row {number + 1} has no {column!r}; its columns: {', '.join(map(str, row))}")
    return row[column]


def text_of(task: str, row: Row, number: int, column: str) -> str:
    """A row's column, which must be a text."""
    text = value_of(task, row, number, column)
    if not isinstance(text, str):
        raise wrong(task, number, column, text, "a text")
    check_characters(task, number, column, text)
    return text


def texts_of(task: str, row: Row, number: int, column: str) -> list[str]:
    """A row's column, which must be a list of texts."""
    texts = value_of(task, row, number, column)
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise wrong(task, number, column, texts, "a list of texts")
    for text in texts:
        check_characters(task, number, column, text)
    return list(texts)


def check_characters(task: str, number: int, column: str, text: str) -> None:
    """That a tokenizer can read a text: Python's strings may hold half a surrogate pair, UTF-8 may not."""
    if not text.isascii() and SURROGATE.search(text):
        raise wrong(task, number, column, text, "a text without half surrogate pairs")


def integer(value: Any) -> int | None:
    """A whole number as an int; None: it is none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def wrong(task: str, number: int, column: str, given: Any, expected: str) -> ValueError:
    """The error of a row that holds something else."""
    return ValueError(f"task {task!r}: row {number + 1}: {column} is {reprlib.repr(given)}; expected {expected}")


def tell(task: str, count: int, rows: int, what: str) -> None:
    """Warns that something happened to so many of the rows."""
    if count:
        warnings.warn(f"task {task!r}: {count} of {rows} {what}", stacklevel=3)
