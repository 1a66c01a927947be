"""A task that needs no training: is a text "long" or "short"?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmengine import metrics
from llmengine.data.examples import Examples
from llmengine.metrics import Judgement
from llmengine.tasks import Answer, Row, Task


@dataclass(frozen=True)
class Options:
    limit: int = 10


class Lengths(Task):
    name = "lengths"
    objective = "classification"
    columns = {"text": "a text", "text_pair": "another", "label": "long or short"}  # noqa: RUF012
    asked = ("text", "text_pair")
    Options = Options

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> Examples:
        raise NotImplementedError("nothing is trained")

    def answers(self, model, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        assert not model.training
        for row in rows:
            length = len(row["text"] + row.get("text_pair", ""))
            long = length / (length + self.options.limit)
            yield {"label": "long" if long > 0.5 else "short", "scores": {"long": long, "short": 1 - long}}

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        for i, row in enumerate(rows):
            if "label" not in row:
                raise ValueError(f"task 'lengths': row {i + 1} has no 'label'")
        gold, given = ([each["label"] for each in side] for side in (rows, answers))
        return metrics.classification(gold, given, self.labels)
