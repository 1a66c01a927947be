"""A class of a text or of a pair of texts, several classes, or numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llmengine import metrics
from llmengine.metrics import Judgement
from llmengine.tasks.reading import Example, Reading, SequenceExamples, blocks
from llmengine.tasks.rows import placed, tell, tell_unknown, text_of, value_of, wrong
from llmengine.tasks.task import Answer, Row

NUMBER = "value"  # the name of a regression's only output; several are value_0, value_1, …


@dataclass(frozen=True)
class ClassificationOptions:
    problem: Literal["single", "multi", "regression"] = "single"
    """single: one class per row, label is its name; multi: none or several, label is a list of names; regression: label
    is a number, or a list of as many numbers in each row."""
    threshold: float = 0.5
    """multi: the probability from which on a class is answered."""

    def __post_init__(self) -> None:
        if self.problem not in ("single", "multi", "regression"):
            raise ValueError(f"task 'classification': problem {self.problem!r} is not one of single, multi, regression")
        if not 0 < self.threshold < 1:
            raise ValueError(f"task 'classification': threshold must be between 0 and 1, got {self.threshold}")


class Classification(Reading):
    """Where a pair is longer than max_length, the longer text loses its last tokens until both are equally long, then
    both do; a single text loses its last tokens. `truncated` of the examples counts such rows."""

    name = "classification"
    objective = "classification"
    columns: ClassVar[dict[str, str]] = {
        "text": "the text",
        "text_pair": "a second text that belongs to it; may be missing",
        "label": "a class; a list of classes where problem is multi; a number, or several, where it is regression",
    }
    asked = ("text", "text_pair")
    Options = ClassificationOptions

    @classmethod
    def labels_of(cls, rows: Sequence[Row], options: ClassificationOptions) -> tuple[str, ...]:
        """The classes of the rows, sorted, numbers by their value; of a regression the names of its numbers."""
        if options.problem == "regression":
            count = len(_numbers(rows[0], placed(rows[:1])[0][0])) if rows else 1
            return (NUMBER,) if count == 1 else tuple(f"{NUMBER}_{i}" for i in range(count))
        names: set[str] = set()
        for place, row in placed(rows):
            names.update([_class(row, place)] if options.problem == "single" else _classes(row, place))
        least = 2 if options.problem == "single" else 1
        if len(names) < least:
            raise ValueError(
                f"task 'classification': label of the {len(rows)} rows has {len(names)} classes, "
                f"{', '.join(map(repr, names)) or 'none'}; expected {least} or more"
            )
        in_numbers = all(name.isdecimal() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name), name) if in_numbers else (0, name)))

    def model_fields(self) -> dict[str, Any]:
        return {"n_labels": len(self.labels), "labels": self.labels, "problem": self.options.problem}

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> SequenceExamples:
        block = placed(rows)
        made, truncated = self._read(block)
        for (place, row), example in zip(block, made, strict=True):
            example["labels"] = self._target(row, place)
        tell(self.name, truncated, len(rows), self.cut)
        return SequenceExamples(made, self, truncated)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        self.wrap(model)
        truncated = 0
        for block in blocks(rows):
            made, cut = self._read(block)
            truncated += cut
            yield from map(self._answer, self.outputs(model, made, _logits, batch_tokens))
        tell(self.name, truncated, len(rows), self.cut)

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        block = placed(rows)
        if self.options.problem == "regression":
            gold = [self._values(row, place) for place, row in block]
            return metrics.regression(gold, [_several(answer["value"]) for answer in answers], self.labels)
        if self.options.problem == "multi":
            sets = [_classes(row, place) for place, row in block]
            self._tell_unknown(sets)
            known = self._with(name for names in sets for name in names)
            return metrics.multi_label(sets, [answer["labels"] for answer in answers], known)
        names = [_class(row, place) for place, row in block]
        self._tell_unknown([[name] for name in names])
        return metrics.classification(names, [answer["label"] for answer in answers], self._with(names))

    def _with(self, names: Iterable[str]) -> tuple[str, ...]:
        """The task's classes, and behind them others that rows have: there no answer is ever right."""
        return (*self.labels, *sorted(set(names) - set(self.labels)))

    def _tell_unknown(self, sets: Sequence[Sequence[str]]) -> None:
        tell_unknown(self.name, "label", self.labels, sets, "no answer to them is all right")

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _read(self, block: Sequence[tuple[str, Row]]) -> tuple[list[Example], int]:
        """Inputs of placed rows, and how many of them were cut."""
        first = [text_of(self.name, row, place, "text") for place, row in block]
        paired = [row.get("text_pair") is not None for _, row in block]
        pairs = (each for each, pair in zip(block, paired, strict=True) if pair)
        second = [text_of(self.name, row, place, "text_pair") for place, row in pairs]
        encoded = (encoding.ids for encoding in self.tokenizer.encodings(second))
        made = [
            self.fitted(encoding.ids, next(encoded) if pair else None)
            for encoding, pair in zip(self.tokenizer.encodings(first), paired, strict=True)
        ]
        return [self.example(inputs) for inputs, _ in made], sum(cut for _, cut in made)

    def _target(self, row: Row, place: str) -> Tensor:
        """A row's label as the model takes it."""
        if self.options.problem == "regression":
            return torch.tensor([self._values(row, place)])
        names = [_class(row, place)] if self.options.problem == "single" else _classes(row, place)
        if unknown := [name for name in names if name not in self.labels]:
            raise wrong(self.name, place, "label", unknown[0], f"one of {', '.join(self.labels)}")
        places = torch.tensor([self.labels.index(name) for name in names], dtype=torch.int64)
        if self.options.problem == "single":
            return places[0]
        return torch.zeros(1, len(self.labels)).index_fill(1, places, 1.0)

    def _values(self, row: Row, place: str) -> list[float]:
        values = _numbers(row, place)
        if len(values) != len(self.labels):
            raise wrong(self.name, place, "label", row["label"], f"as many numbers as the others, {len(self.labels)}")
        return values

    def _answer(self, logits: Tensor) -> Answer:
        problem = self.options.problem
        if problem == "regression":
            return {"value": logits.tolist() if len(logits) > 1 else float(logits)}
        probabilities = logits.softmax(0) if problem == "single" else logits.sigmoid()
        scores = dict(zip(self.labels, probabilities.tolist(), strict=True))
        if problem == "single":
            return {"label": self.labels[int(logits.argmax())], "scores": scores}
        return {"labels": [name for name, score in scores.items() if score >= self.options.threshold], "scores": scores}


def _several(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]


def _logits(out: Any, batch: dict[str, Any]) -> list[Tensor]:
    return list(out.head_logits["classification"].float().cpu())


def _class(row: Row, place: str) -> str:
    name = value_of("classification", row, place, "label")
    if not isinstance(name, str | Integral) or name == "":  # an empty cell of a table
        raise wrong("classification", place, "label", name, "the name of a class")
    return str(name)


def _classes(row: Row, place: str) -> list[str]:
    names = value_of("classification", row, place, "label")
    if isinstance(names, Sequence) and not isinstance(names, str):
        return [_class({"label": name}, place) for name in names]
    raise wrong("classification", place, "label", names, "a list of names of classes")


def _numbers(row: Row, place: str) -> list[float]:
    values = value_of("classification", row, place, "label")
    try:
        numbers = [float(value) for value in _several(values)]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise wrong("classification", place, "label", values, "a finite number, or several")
    return numbers
