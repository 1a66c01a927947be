"""metrics.jsonl: one record a line, appended as training goes, cut back to the checkpoint's step when it resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from llmengine.files import replace_text

Record = dict[str, Any]


class Metrics:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def append(self, record: Record) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Returns when all records are on the disk: no checkpoint may be there before the records that lead to it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Record]:
    """All whole records, none where there is no file; a line that a killed process left half-written is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def cut(path: Path, step: int) -> list[Record]:
    """Drops the records after `step`, which a resumed run writes anew; returns those that stay."""
    records = [record for record in read(path) if record["step"] <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records
