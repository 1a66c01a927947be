"""What a fine-tuning task is: rows of data become examples, a model's answers to rows are judged.

A row is a plain dict, whatever file it came from (llmengine/data/rows.py); so is an answer: both go to and from JSON.
"""

from __future__ import annotations

import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from llmengine.data.examples import Examples, tokens_of
from llmengine.data.tokenizer import Tokenizer
from llmengine.files import read_json, replace_text
from llmengine.metrics import Judgement

Row = Mapping[str, Any]
Answer = dict[str, Any]
FILE = "task.json"  # beside a model's weights: what its answers mean
# name: where its class is; the name is also the name of the file
TASKS: dict[str, str] = {
    "classification": "Classification",
    "tagging": "Tagging",
    "qa": "QA",
    "choice": "Choice",
    "seq2seq": "Seq2Seq",
    "chat": "Chat",
    "preference": "Preferences",
}


class Task(ABC):
    """One kind of question that a model answers. A subclass is a file of this room and an entry of TASKS."""

    name: ClassVar[str]
    objective: str
    """The head of the model that answers."""
    columns: ClassVar[dict[str, str]]
    """What a row of training data holds: {name: what it is}."""
    asked: ClassVar[tuple[str, ...]]
    """Those of the columns that a question has; the others are its answer."""
    Options: ClassVar[type]
    """A frozen dataclass: what a person may choose."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: Any) -> None:
        """max_length: the most tokens of an example, special tokens included. labels: the names of the classes, in the
        order of the head's outputs; () where the task has none."""
        self.tokenizer, self.max_length, self.labels, self.options = tokenizer, max_length, tuple(labels), options

    # ---- what each task says -----------------------------------------------------------------------------------------

    @classmethod
    def labels_of(cls, rows: Sequence[Row], options: Any) -> tuple[str, ...]:
        """The classes that training data have, sorted; () where the task has none."""
        return ()

    def model_fields(self) -> dict[str, Any]:
        """Fields of TransformerConfig that the task decides: n_labels, problem, crf, …"""
        return {}

    @abstractmethod
    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> Examples:
        """Rows with answers, to train and to measure losses on. ValueErrors name row, column, given and allowed."""

    @abstractmethod
    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        """The model's answers to rows (their own answers are not looked at), one a row and in their order."""

    @abstractmethod
    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        """Answers beside the rows' own."""

    def wrap(self, model: Any) -> Any:
        """What is trained: the model, or a module around it whose forward takes the examples' batches and gives .loss
        and .losses, and which has .config, .words and .save_pretrained as a Transformer does."""
        return model

    def foresee(self, rows: Sequence[Row]) -> None:  # noqa: B027
        """Called before training with rows that are answered after it, for what only the untrained model knows."""

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> None:
        """Writes task.json beside a model."""
        facts = {"task": self.name, "max_length": self.max_length, "labels": list(self.labels)}
        text = json.dumps({**facts, "options": asdict(self.options)}, indent=2, ensure_ascii=False)
        replace_text(Path(directory) / FILE, text + "\n")


class TaskExamples(Examples):
    """Examples that are the same in every epoch: tensors as `Examples.__getitem__` describes them, made once."""

    def __init__(self, made: Sequence[dict[str, Tensor]], task: Task) -> None:
        self.made = made
        self.heads = (task.objective,)
        self._lengths = np.array([tokens_of(example) for example in made], np.int64)

    def lengths(self, epoch: int) -> np.ndarray:
        return self._lengths

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        return self.made[place[1]]


def make(
    name: str, tokenizer: Tokenizer, rows: Sequence[Row], *, max_length: int, labels: Sequence[str] | None = None,
    **options: Any,
) -> Task:  # fmt: skip
    """A task for training rows. labels: the classes where they are known; None: those that the rows have."""
    cls = class_of(name)
    chosen = _options(cls, options)
    return cls(tokenizer, max_length, cls.labels_of(rows, chosen) if labels is None else labels, chosen)


def load(directory: str | os.PathLike, tokenizer: Tokenizer) -> Task:
    """The task of a fine-tuned model's directory. Raises FileNotFoundError, ValueError."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {FILE}: it is no fine-tuned model; give what `finetune` wrote")
    facts = read_json(path, "task")
    try:
        name, length, labels, options = (facts[key] for key in ("task", "max_length", "labels", "options"))
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    cls = class_of(name)
    return cls(tokenizer, length, labels, _options(cls, options))


def class_of(name: str) -> type[Task]:
    if name not in TASKS:
        raise ValueError(f"task: {name!r} is not one of {', '.join(TASKS)}")
    return getattr(importlib.import_module(f"llmengine.tasks.{name}"), TASKS[name])


def _options(cls: type[Task], given: Mapping[str, Any]) -> Any:
    allowed = [field.name for field in fields(cls.Options)]
    if unknown := sorted(set(given) - set(allowed)):
        raise ValueError(f"task {cls.name!r}: no option {', '.join(unknown)}; options: {', '.join(allowed) or 'none'}")
    return cls.Options(**given)
