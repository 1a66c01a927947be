"""The rows of a fine-tuning run: those to train on, and those that are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from llmengine.data.draws import Draws, Purpose
from llmengine.data.rows import read_rows
from llmengine.files import sha256
from llmengine.tasks import Row
from llmengine.training.finetune_config import FinetuneConfig, Source
from llmengine.training.run import model_directory


@dataclass(frozen=True)
class TrainingRows:
    train: list[Row]
    held_out: list[Row]
    given: list[Row]
    """All rows of `train`'s files: the task's classes are theirs."""
    test: list[Row]

    @classmethod
    def read(cls, config: FinetuneConfig, notice: Callable[[str], None]) -> TrainingRows:
        train = read_source(config, config.train, notice)
        test = [] if config.test is None else read_source(config, config.test, notice)
        if isinstance(config.validation, float | int):
            return cls(*split(train, config.validation, config.seed), train, test)
        return cls(train, read_source(config, config.validation, notice), train, test)

    def digest(self, config: FinetuneConfig, *, builds_on_model: bool) -> str:
        """Of the rows, and of the files of weights that stay beside those that are trained: a teacher's, and the
        pretrained model's where the run builds on it to its end."""
        digest = hashlib.sha256()
        for rows in (self.train, self.held_out):
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
            digest.update(b"\0")
        for directory in (config.model if builds_on_model else None, config.teacher):
            if isinstance(directory, str):
                for path in sorted(model_directory(directory).glob("*.safetensors")):
                    digest.update(sha256(path).encode())
        return digest.hexdigest()


def read_source(config: FinetuneConfig, source: Source, notice: Callable[[str], None] = lambda _: None) -> list[Row]:
    return list(read_rows(source, columns=config.columns or None, bad=config.bad, notice=notice, **config.format))


def split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out), in the rows' own order; which are held out is decided by seed alone. Fraction 0: none."""
    if fraction == 0:
        return rows, []
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise ValueError(
            f"train has {len(rows)} rows, too few to hold out {fraction:g} of them (validation); give more rows, "
            "validation files, or 0"
        )
    chosen = set(Draws(seed, 0, Purpose.SPLIT).order(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]
