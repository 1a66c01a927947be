"""Corpora: what a `source` names becomes a list of documents, and a part of them is held out."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llmengine.data.draws import Draws, Purpose

BUILT_IN = {"austen": Path(__file__).parent / "corpora" / "austen"}
TEXT, LINES = (".txt", ".txt.xz", ".txt.gz"), (".jsonl", ".jsonl.xz", ".jsonl.gz")
PARAGRAPH_END, LINE_END, SPACE = re.compile(r"\n(?:[ \t]*\n)+"), re.compile(r"\n"), re.compile(r"\s")
SURROGATE = re.compile("[\ud800-\udfff]")
SMALL = 1 / 5  # of the held-out part: documents up to this size are held out whole


def read_documents(source: str | Path | Sequence[str | Path]) -> list[str]:
    """The documents that `source` names, in a fixed order. Line ends become \\n; blank documents are left out.

    source: "austen" (six novels that the package carries); a .txt file (one document); a .jsonl file (one document a
    line, under the key "text"); either may be compressed (.gz, .xz); a folder of such files, sorted by path; or a
    sequence of these. Raises FileNotFoundError, or ValueError naming file, place and remedy.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    documents = [text for each in sources for path in _files(each) for text in _read(path) if text.strip()]
    if not documents:
        raise ValueError(f"corpus: {', '.join(map(str, sources)) or 'no source'}: holds no text; give files with text")
    return documents


def split_documents(documents: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, held_out), the latter about `fraction` of the characters, chosen by seed alone.

    Whole documents where they are small against the held-out part; else the end of every document, cut at a
    paragraph's end (where there is none: at a line's, at a word's). Fraction 0 holds nothing out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"split_documents: fraction must be in [0, 1), got {fraction}")
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


def _read(path: Path) -> Iterator[str]:
    """The documents of one file."""
    try:
        with _open(path) as file:
            if path.name.endswith(LINES):
                yield from _records(path, file)
            else:
                yield _text(path, file.read(), 0)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"corpus: {path} cannot be uncompressed: {error}") from None
    except OSError as error:
        raise type(error)(f"corpus: {path} cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    return opener(path, "rb")  # type: ignore[operator, return-value]


def _records(path: Path, file: BinaryIO) -> Iterator[str]:
    """The texts of a .jsonl file; blank lines are skipped."""
    offset = 0
    for number, line in enumerate(file, 1):
        text = _text(path, line, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"corpus: {path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            given = f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(f'corpus: {path}, line {number} has {given}; expected an object with a string "text"')
        if SURROGATE.search(record["text"]):
            raise ValueError(f'corpus: {path}, line {number}: "text" has half a surrogate pair, which is no character')
        yield _lines(record["text"])


def _text(path: Path, data: bytes, offset: int) -> str:
    """UTF-8 to text; `offset`: where in the (uncompressed) file the data begin."""
    zero = data.find(b"\0")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus: {path} is not UTF-8 text: byte {offset + error.start} is 0x{data[error.start]:02x}; "
            "convert it first, as with: iconv -f LATIN1 -t UTF-8"
        ) from None
    if zero >= 0:
        raise ValueError(f"corpus: {path} is not text: byte {offset + zero} is zero; give UTF-8 text files")
    return _lines(text.removeprefix("\ufeff") if offset == 0 else text)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
