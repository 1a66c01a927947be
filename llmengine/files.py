"""Files: small ones read with errors that name them and written whole or not at all; digests of large ones."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where what was measured or made for this machine lies: $XDG_CACHE_HOME/llmengine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmengine"


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """A file's digest in hexadecimal; the file may be large."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Writes a file under another name and renames it."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file under another name and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def read_json(path: Path, reader: str) -> dict[str, Any]:
    """An object. Raises ValueError, in the name of `reader`, for a file that holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{reader}: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{reader}: {path} holds a {type(value).__name__}; expected an object")
    return value
