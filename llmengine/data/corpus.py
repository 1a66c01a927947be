"""Corpora: what a `source` names becomes documents, one by one or in a list of which a part is held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from llmengine.data.draws import Draws, Purpose
from llmengine.data.textfiles import decode, numbered_lines, opened, parse_json

T = TypeVar("T")

BUILT_IN = {"austen": Path(__file__).parent / "corpora" / "austen"}
UNITS = ("file", "paragraph", "line")
TEXT, LINES = (".txt", ".txt.xz", ".txt.gz"), (".jsonl", ".jsonl.xz", ".jsonl.gz")
PARAGRAPH_END, LINE_END, SPACE = re.compile(r"\n(?:[ \t]*\n)+"), re.compile(r"\n"), re.compile(r"\s")
SMALL = 1 / 5  # of the held-out part: documents up to this size are held out whole


def read_documents(source: str | Path | Sequence[str | Path]) -> list[str]:
    """The documents that `source` names, in a fixed order. Line ends become \\n; blank documents are left out.

    source: "austen" (six novels that the package carries); a .txt file (one document); a .jsonl file (one document a
    line, under the key "text"); either may be compressed (.gz, .xz); a folder of such files, sorted by path; or a
    sequence of these. Raises FileNotFoundError, or ValueError naming file, place and remedy.
    """
    return list(iterate_documents(source))


def iterate_documents(source: str | Path | Sequence[str | Path], *, unit: str = "file") -> Iterator[str]:
    """What `read_documents` gives, one document at a time: for corpora larger than memory.

    unit: what a document of a .txt file is: "file" (all of it), "paragraph" (lines up to a blank one), "line". Files
    are looked for at once, and read when their documents are asked for.
    """
    if unit not in UNITS:
        raise ValueError(f"corpus: unit must be one of {', '.join(UNITS)}, got {unit!r}")
    sources = [source] if isinstance(source, str | Path) else list(source)
    names = ", ".join(map(str, sources)) or "no source"
    return _documents([path for each in sources for path in _files(each)], unit, names)


def _documents(paths: Sequence[Path], unit: str, names: str) -> Iterator[str]:
    empty = True
    for path in paths:
        for text in _read(path, unit):
            if text.strip():
                empty = False
                yield text
    if empty:
        raise ValueError(f"corpus: {names}: holds no text; give files with text")


def split_documents(documents: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, held_out), the latter about `fraction` of the characters, chosen by seed alone.

    Whole documents where they are small against the held-out part; else the end of every document, cut at a
    paragraph's end (where there is none: at a line's, at a word's). Fraction 0 holds nothing out.
    """
    check_fraction("split_documents", fraction)
    if fraction == 0:
        return list(documents), []
    wanted = fraction * sum(map(len, documents))
    if max(map(len, documents), default=0) <= SMALL * wanted:
        train, held_out = _whole(documents, wanted, seed)
    else:
        parts = [_cut(document, fraction) for document in documents]
        train, held_out = ([part[i] for part in parts if part[i].strip()] for i in (0, 1))
    if not train or not held_out:
        raise ValueError(
            f"split_documents: {len(documents)} documents with {sum(map(len, documents))} characters are too few to "
            f"hold out {fraction:.3g} of them; give more text, or hold out nothing (0)"
        )
    return train, held_out


def check_fraction(caller: str, fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"{caller}: fraction must be in [0, 1), got {fraction}")


def _whole(documents: Sequence[str], wanted: float, seed: int) -> tuple[list[str], list[str]]:
    chosen: set[int] = set()
    size = 0
    for i in Draws(seed, 0, Purpose.SPLIT).order(len(documents)).tolist():
        if size >= wanted or len(chosen) == len(documents) - 1:  # something must be left to train on
            break
        chosen.add(i)
        size += len(documents[i])
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def _cut(document: str, fraction: float) -> tuple[str, str]:
    """A document in two: the cut lies where a paragraph, line or word ends, nearest to the fraction asked for."""
    wanted = len(document) * (1 - fraction)
    # both parts must hold text
    first, last = len(document) - len(document.lstrip()), len(document.rstrip())
    for end in (PARAGRAPH_END, LINE_END, SPACE):
        places = [match.end() for match in end.finditer(document, first, last)]
        if places:
            place = min(places, key=lambda at: abs(at - wanted))
            return document[:place], document[place:]
    return document, ""


# ---- files -----------------------------------------------------------------------------------------------------------


def _files(source: str | Path) -> list[Path]:
    """The files of one source, sorted."""
    built_in = BUILT_IN.get(source) if isinstance(source, str) else None
    path = built_in or Path(source).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.name.endswith(TEXT + LINES) and p.is_file()]
        # hidden files and folders are editors' and systems', not text
        found = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not found:
            raise ValueError(f"corpus: {path} has no file named {_names()}")
        return found
    if not path.exists():
        raise FileNotFoundError(
            f"corpus: {source} does not exist; give a file ({_names()}), a folder of such files, "
            f"or a built-in corpus: {', '.join(BUILT_IN)}"
        )
    if not path.name.endswith(TEXT + LINES):
        raise ValueError(f"corpus: {path} is not a kind of file that is read; allowed: {_names()}")
    return [path]


def _names() -> str:
    return " ".join(f"*{suffix}" for suffix in TEXT + LINES)


def _read(path: Path, unit: str) -> Iterator[str]:
    """The documents of one file."""
    with opened(path, "corpus") as file:
        if path.name.endswith(LINES):
            for place, text in _text_lines(path, file):
                if text.strip():
                    yield _lines(_text_of(place, _named(place, parse_json, text)))
        elif unit == "file":
            yield _lines(_named(path, decode, file.read(), 0))
        else:
            texts = (text for _, text in _text_lines(path, file))
            yield from texts if unit == "line" else _paragraphs(texts)


def _text_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, str]]:
    """(place, text with \n at its end) of each line."""
    for number, offset, line in numbered_lines(file):
        place = f"{path}, line {number}"
        yield place, _lines(_named(place, decode, line, offset))


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for is_blank, group in groupby(lines, lambda line: not line.strip()):
        if not is_blank:
            yield "".join(group)


def _named(place: Path | str, function: Callable[..., T], *arguments: Any) -> T:
    """A function's result; its error goes on after the place."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"corpus: {place} {error}") from None


def _text_of(place: str, record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        given = f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f'corpus: {place} has {given}; expected an object with a string "text"')
    return record["text"]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
