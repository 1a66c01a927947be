"""Data sets that are one JSON document: a list of rows, or questions about paragraphs as SQuAD has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmengine.data.formats.faults import Faults, Placed, Row
from llmengine.data.formats.lines import as_row
from llmengine.data.textfiles import decode, opened, parse_json


def read_json(path: Path, faults: Faults) -> Iterator[Placed]:
    """The objects of a list, or of the list under "data"; a file of SQuAD's layout as `read_squad`.

    The whole file is held in memory.
    """
    document = _document(path)
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise ValueError(f'data: {path} has {_kind(document)}; expected a list of objects, or one under "data"')
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        yield from _questions(path, rows, faults)
        return
    for number, row in enumerate(rows):
        yield from as_row(f"{path}, row {number}", row, faults)


def read_squad(path: Path, faults: Faults) -> Iterator[Placed]:
    """{id, title, question, context, answers: {text, answer_start}} of SQuAD 1.1 or 2.0 (Rajpurkar et al. 2016, 2018).

    Of a question that has no answer the lists are empty; of one whose answers are not told `answers` is missing. An
    answer that is not in its context at its place is a fault. The whole file is held in memory.
    """
    document = _document(path)
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise ValueError(f'data: {path} has {_kind(document)}; expected SQuAD\'s layout, an object with a list "data"')
    yield from _questions(path, document["data"], faults)


def _document(path: Path) -> Any:
    with opened(path, "data") as file:
        data = file.read()
    try:
        return parse_json(decode(data, 0))
    except ValueError as error:
        raise ValueError(f"data: {path} {error}") from None


def _kind(value: Any) -> str:
    return (
        f"an object with {', '.join(map(repr, value)) or 'no names'}"
        if isinstance(value, dict)
        else (f"a {type(value).__name__}")
    )


# ---- SQuAD -----------------------------------------------------------------------------------------------------------


def _questions(path: Path, articles: list[Any], faults: Faults) -> Iterator[Placed]:
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}, data[{a}]", faults)):
            place = f"{path}, data[{a}].paragraphs[{p}]"
            for q, question in enumerate(_list(paragraph, "qas", place, faults)):
                try:
                    yield f"{place}.qas[{q}]", _question(article, paragraph, question)
                except ValueError as error:
                    faults(f"{place}.qas[{q}]", str(error))


def _list(value: Any, name: str, place: str, faults: Faults) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if isinstance(found, list):
        return found
    faults(place, f"has {_kind(value)}; expected an object with a list {name!r}")
    return []


def _question(article: Row, paragraph: Row, question: Any) -> Row:
    """A row. Raises ValueError whose text goes on after the place."""
    context = paragraph.get("context")
    if not isinstance(context, str) or not context.strip():
        raise ValueError("belongs to a paragraph without a context")
    if not isinstance(question, dict) or not isinstance(question.get("question"), str):
        raise ValueError('has no string "question"')
    row: Row = {name: question[name] for name in ("id",) if name in question}
    row |= {name: article[name] for name in ("title",) if name in article}
    row |= {"question": question["question"], "context": context}
    if "answers" in question:
        row["answers"] = _answers(context, question)
    return row


def _answers(context: str, question: Row) -> Row:
    answers, impossible = question["answers"], question.get("is_impossible")
    if not isinstance(answers, list):
        raise ValueError(f'has {_kind(answers)} for "answers"; expected a list')
    if impossible is not None and bool(answers) == bool(impossible):
        raise ValueError(f"has {len(answers)} answers, but is_impossible is {impossible}")
    for i, answer in enumerate(answers):
        text, start = (answer.get(name) if isinstance(answer, dict) else None for name in ("text", "answer_start"))
        if not isinstance(text, str) or not text or not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f'has an answer {i} without a "text" or a whole number "answer_start"')
        if start < 0 or context[start : start + len(text)] != text:
            found = context.find(text)
            where = f"it is at {found}" if found >= 0 else "it is nowhere in the context"
            raise ValueError(f"has the answer {text[:40]!r} at character {start} of its context, but {where}")
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
