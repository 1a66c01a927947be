"""Formats with a row a line: JSON lines, plain text, and two text files side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmengine.data.formats.faults import Faults, Placed
from llmengine.data.textfiles import decode, numbered_lines, opened, parse_json


def read_jsonl(path: Path, faults: Faults) -> Iterator[Placed]:
    """An object a line. Blank lines are no rows."""
    with opened(path, "data") as file:
        for number, offset, line in numbered_lines(file):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = parse_json(decode(line, offset))
            except ValueError as error:
                faults(place, str(error))
                continue
            yield from as_row(place, record, faults)


def as_row(place: str, record: Any, faults: Faults) -> Iterator[Placed]:
    """The row that a JSON value is, if it is one."""
    if isinstance(record, dict):
        yield place, record
    else:
        faults(place, f"has a {type(record).__name__}; expected an object: a name and a value for each column")


def read_text(path: Path, faults: Faults) -> Iterator[Placed]:
    """{text} for each line. Blank lines are no rows; how many there were is told."""
    blank = 0
    for place, text in _texts(path, faults):
        if text is None:
            continue
        if text.strip():
            yield place, {"text": text}
        else:
            blank += 1
    if blank:
        faults.notice(f"data: {path} has {blank:,} blank {'line, which is no row' if blank == 1 else 'lines: no rows'}")


def read_parallel(source: Path, target: Path, faults: Faults) -> Iterator[Placed]:
    """{source, target} for each line of two files of equally many lines, none of which is blank."""
    counts = [_count(path) for path in (source, target)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"data: {source} has {counts[0]:,} lines and {target} has {counts[1]:,}: line by line they do not belong "
            "together; give files of equally many lines"
        )
    for (place, one), (other_place, other) in zip(_texts(source, faults), _texts(target, faults), strict=True):
        if one is None or other is None:
            continue
        if not one.strip() or not other.strip():
            faults(other_place if one.strip() else place, "is blank")
            continue
        yield f"{place} and {other_place}", {"source": one, "target": other}


def _count(path: Path) -> int:
    with opened(path, "data") as file:
        return sum(1 for _ in file)


def _texts(path: Path, faults: Faults) -> Iterator[tuple[str, str | None]]:
    """(place, text without the line's end) of each line; None where it is a fault."""
    with opened(path, "data") as file:
        for number, offset, line in numbered_lines(file):
            place = f"{path}, line {number}"
            try:
                yield place, decode(line, offset).removesuffix("\n").removesuffix("\r")
            except ValueError as error:
                faults(place, str(error))
                yield place, None
