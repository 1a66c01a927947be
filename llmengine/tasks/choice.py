"""The right one of several answers to a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmengine import metrics
from llmengine.metrics import Judgement
from llmengine.tasks.reading import Example, Reading, SequenceExamples, blocks
from llmengine.tasks.rows import integer, placed, tell, text_of, texts_of, value_of, wrong
from llmengine.tasks.task import Answer, Row


@dataclass(frozen=True)
class ChoiceOptions:
    pass


class Choice(Reading):
    """Each choice is read behind the question and gets a number; the numbers of a question are scores of one class.

    Questions may have different numbers of choices. Where question and choice are longer than max_length, the longer
    one loses its last tokens until both are equally long, then both do. `truncated` counts such questions.
    """

    name = "choice"
    objective = "choice"
    columns: ClassVar[dict[str, str]] = {
        "question": "the question, or the beginning of a text",
        "choices": "a list of answers, or of ways to go on",
        "label": "the number of the right one, from 0",
    }
    asked = ("question", "choices")
    Options = ChoiceOptions

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> SequenceExamples:
        block = placed(rows)
        made, truncated = self._read(block)
        for (place, row), example in zip(block, made, strict=True):
            example["labels"] = torch.tensor(self._label(row, place))
        tell(self.name, truncated, len(rows), self.cut)
        return SequenceExamples(made, self, truncated)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        self.wrap(model)
        truncated = 0
        for block in blocks(rows):
            made, cut = self._read(block)
            truncated += cut
            for scores in self.outputs(model, made, _scores, batch_tokens):
                yield {"choice": int(scores.argmax()), "scores": scores.softmax(0).tolist()}
        tell(self.name, truncated, len(rows), self.cut)

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        gold = [self._label(row, place) for place, row in placed(rows)]
        given = [answer["choice"] for answer in answers]
        places = [str(i) for i in range(max([*gold, *given], default=0) + 1)]
        return metrics.classification(list(map(str, gold)), list(map(str, given)), places)

    def collate(self, examples: list[Example]) -> dict[str, Any]:
        """A packed batch of all choices, one after another."""
        lengths = torch.cat([example["lengths"] for example in examples])
        packed = super().collate([{k: x for k, x in example.items() if k != "lengths"} for example in examples])
        return packed | {
            "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            "max_seqlen": int(lengths.max()),
            "choices": torch.tensor([len(example["lengths"]) for example in examples]),
        }

    def _read(self, block: Sequence[tuple[str, Row]]) -> tuple[list[Example], int]:
        """Inputs of placed rows, and how many of them were cut. lengths: of each choice, all of which are one
        example."""
        questions = self.tokenizer.encodings([text_of(self.name, row, place, "question") for place, row in block])
        choices = [self._choices(row, place) for place, row in block]
        encoded = self.tokenizer.encodings([choice for each in choices for choice in each])
        made, truncated, bounds = [], 0, accumulate(map(len, choices), initial=0)
        for question, (begin, end) in zip(questions, pairwise(bounds), strict=True):
            fitted = [self.fitted(question.ids, encoding.ids) for encoding in encoded[begin:end]]
            parts = [self.example(inputs) for inputs, _ in fitted]
            example = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            made.append({**example, "lengths": torch.tensor([len(part["input_ids"]) for part in parts])})
            truncated += any(cut for _, cut in fitted)
        return made, truncated

    def _choices(self, row: Row, place: str) -> list[str]:
        choices = texts_of(self.name, row, place, "choices")
        if not choices:
            raise wrong(self.name, place, "choices", choices, "one choice or more")
        return choices

    def _label(self, row: Row, place: str) -> int:
        count = len(self._choices(row, place))
        label = integer(value_of(self.name, row, place, "label"))
        if label is None or not 0 <= label < count:
            raise wrong(self.name, place, "label", row["label"], f"a number from 0 to {count - 1}")
        return label


def _scores(out: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Of each question's choices."""
    scores = out.head_logits["choice"].float().cpu()
    return [each[:count] for each, count in zip(scores, batch["choices"].tolist(), strict=True)]
