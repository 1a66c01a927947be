"""Text files of any size: opened, decoded, read as JSON, with errors that say which byte or line is wrong."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

OPENERS = {".xz": lzma.open, ".gz": gzip.open}
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def opened(path: Path, reader: str) -> Iterator[BinaryIO]:
    """The (uncompressed) bytes of a file. Errors, also those of reading it, name it and its `reader`."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:  # type: ignore[operator]
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{reader}: {path} cannot be uncompressed: {error}") from None
    except OSError as error:
        raise type(error)(f"{reader}: {path} cannot be read: {error.strerror or error}") from None


def without_compression(path: Path) -> str:
    """A file's name without .gz or .xz."""
    return path.stem if path.suffix in OPENERS else path.name


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in the file, bytes with the line's end) of each line."""
    offset = 0
    for number, line in enumerate(file, 1):
        yield number, offset, line
        offset += len(line)


def decode(data: bytes, offset: int) -> str:
    """UTF-8 to text; `offset`: where in the file the data begin. A byte-order mark at its beginning is left out.

    Raises ValueError whose text goes on after the name of the file.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 text: byte {offset + error.start} is 0x{data[error.start]:02x}; "
            "convert it first, as with: iconv -f LATIN1 -t UTF-8"
        ) from None
    if (zero := data.find(b"\0")) >= 0:
        raise ValueError(f"is not text: byte {offset + zero} is zero; give UTF-8 text files")
    return text.removeprefix("\ufeff") if offset == 0 else text


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError, whose text goes on after a place, also for what would be lost silently:
    a name twice in an object, half a surrogate pair; and for NaN and Infinity, which JSON does not have.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("is not JSON: it is nested too deeply") from None
    except _Loss as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if ESCAPED_SURROGATE.search(text) and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("has half a surrogate pair, which is no character")
    return value


class _Loss(ValueError):
    """Legal JSON of which a part would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Loss(f"has {twice!r} twice in one object")
    return made


def _no_number(name: str) -> NoReturn:
    raise _Loss(f"has {name}, which is no number of JSON")
