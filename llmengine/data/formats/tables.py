"""CSV and TSV: a header, then a row a record."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmengine.data.formats.faults import Faults, Placed
from llmengine.data.textfiles import decode, numbered_lines, opened


def read_csv(
    path: Path, faults: Faults, *, delimiter: str = ",", quoting: bool = True, header: bool = True
) -> Iterator[Placed]:
    """{column: cell} for each record; cells are strings as they are written, line ends in quotation marks included.

    quoting: cells may be in quotation marks, a mark in them written twice (RFC 4180); False: marks are characters.
    header: the first record names the columns; False: their names are "0", "1", …. Blank lines are no rows.
    """
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise ValueError(f"data: delimiter must be one character, got {delimiter!r}")
    names: list[str] | None = None
    with opened(path, "data") as file:
        for place, cells, wrong in _records(path, _Lines(file), delimiter, quoting):
            if names is None:
                if wrong:
                    raise ValueError(f"data: {place} {wrong}")
                names = _header(place, cells) if header else [str(i) for i in range(len(cells))]
                if header:
                    continue
            if wrong:
                faults(place, wrong)
            elif len(cells) != len(names):
                beside = "the header" if header else "the first record"
                faults(place, f"has {len(cells)} cells, but {beside} has {len(names)}")
            else:
                yield place, dict(zip(names, cells, strict=True))
    if names is None:
        raise ValueError(f"data: {path} is empty: it has no header")


def read_tsv(path: Path, faults: Faults, *, quoting: bool = True, header: bool = True) -> Iterator[Placed]:
    """`read_csv` with tabs between cells."""
    return read_csv(path, faults, delimiter="\t", quoting=quoting, header=header)


def _header(place: str, names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"data: {place} names {', '.join(map(repr, twice))} twice; give each column a name of its own, or, where "
            "that line is no header, header=False"
        )
    return names


class _Lines:
    """The lines of a file as text. What is wrong with one is kept in `wrong`, and U+FFFD stands for it."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = numbered_lines(file)
        self.number = 0
        self.wrong = ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, offset, line = next(self._lines)
        try:
            return decode(line, offset)
        except ValueError as error:
            self.wrong = str(error)
            return line.replace(b"\0", b"?").decode("utf-8", "replace")


def _records(path: Path, lines: _Lines, delimiter: str, quoting: bool) -> Iterator[tuple[str, list[str], str]]:
    """(place, cells, what is wrong) of each record that is not blank."""
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE, strict=True
    )
    while True:
        first, lines.wrong, cells, wrong = lines.number + 1, "", [], ""
        try:
            with _cells_of_any_size():
                cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # its advice for this is about opening files in Python
            wrong = "a carriage return is not in quotation marks" if "new-line" in str(error) else str(error)
        place = f"{path}, line {first}" if lines.number == first else f"{path}, lines {first} to {lines.number}"
        if wrong == "unexpected end of data":
            # what follows the mark cannot be told apart: nothing of it is a row that could be skipped
            raise ValueError(f"data: {place}: a quotation mark is not closed; {_NO_MARKS}")
        if wrong or lines.wrong:
            yield place, [], lines.wrong or f"is no record: {wrong}{f'; {_NO_MARKS}' if quoting else ''}"
        elif cells:
            yield place, cells, ""


_NO_MARKS = "where marks are characters like others, give quoting=False"


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """The csv module refuses cells of more than 131,072 characters, by a limit that all of its readers share."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
