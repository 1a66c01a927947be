"""Preferences: of two answers to a prompt a decoder learns to prefer the one that people chose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from llmengine.data.chat_template import ASSISTANT, ChatTemplate, Message
from llmengine.data.examples import IGNORED, pack
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement, intervals
from llmengine.metrics.score import check_paired
from llmengine.models import Transformer
from llmengine.objectives.likelihood import each_log_likelihood
from llmengine.objectives.preference import Preference, PreferenceLoss
from llmengine.tasks.chat import in_row, messages_of
from llmengine.tasks.rows import placed, tell, text_of
from llmengine.tasks.task import Answer, Row, Task, TaskExamples

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(PreferenceLoss):
    """Options of the loss (llmengine/objectives/preference.py), and

    template: the conversations' Jinja template; None: the tokenizer's, or a plain one.
    reference: where dpo and ipo have the log-probabilities of the model as it was: "live": from a copy of it, beside
        each step; "precomputed": from a copy that reads all examples once and goes when training begins.
    """

    template: str | None = None
    reference: str = "live"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in ("live", "precomputed"):
            raise ValueError(f"task 'preference': reference {self.reference!r} is not one of live, precomputed")


class Preferences(Task):
    """Each row's prompt with either answer is a conversation, as in the task "chat"; the loss sees the answers' tokens
    and their ends. Of a pair longer than max_length both prompts lose as many tokens at their beginning, and, where a
    single one is left, answers lose their end. Rows whose answers are the same are left out of training.

    The answer to a row is the margin of the loss, and whether by it the chosen answer is preferred. The margin of dpo
    and ipo compares the model with its reference: `wrap`'s, or, of a model that was loaded, the one that `compare_with`
    names. Where nobody knows what the model was before, it is beta times the difference of the log-probabilities alone.
    """

    name = "preference"
    objective = "clm"
    columns: ClassVar[dict[str, str]] = {
        "prompt": "a text, or a conversation: [{role, content}, …]",
        "chosen": "the better answer, a text",
        "rejected": "the other answer, a text",
    }
    asked = ("prompt", "chosen", "rejected")
    Options = PreferenceOptions

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: PreferenceOptions
    ) -> None:
        super().__init__(tokenizer, max_length, labels, options)
        if max_length < 2:
            raise ValueError(f"task 'preference': max_length must be 2 or more, got {max_length}")
        self.template = ChatTemplate(tokenizer, options.template)
        self.loss = PreferenceLoss(**{field.name: getattr(options, field.name) for field in fields(PreferenceLoss)})
        self._learner: Preference | None = None
        self._origin: Transformer | None = None  # of a model that was loaded
        self._known: dict[bytes, Tensor] = {}  # the reference's log-probabilities of pairs

    def wrap(self, model: Any) -> Preference:
        self._learner = Preference(model, self.loss, passing=self.options.reference == "precomputed")
        return self._learner

    def compare_with(self, origin: Transformer) -> None:
        """origin: what a model that was loaded, and is asked for answers, was before its training."""
        self._origin = origin.eval()

    def foresee(self, rows: Sequence[Row]) -> None:
        if self.options.reference == "precomputed" and self._learner is not None:
            pairs = [self._pair(row, place)[0] for place, row in placed(rows)]
            self._reference(self._learner.reference, pairs, 4096)

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> PairExamples:
        pairs, long, same = [], 0, 0
        for place, row in placed(rows):
            if text_of(self.name, row, place, "chosen") == text_of(self.name, row, place, "rejected"):
                same += 1
                continue
            pair, cut = self._pair(row, place)
            pairs.append(pair)
            long += cut
        tell(
            self.name, long, len(rows), f"pairs are longer than {self.max_length} tokens: prompts lose their beginning"
        )
        tell(self.name, same, len(rows), "pairs are of the same answer twice, and are left out")
        if not pairs and rows:
            raise ValueError("task 'preference': no row has two different answers")
        known: list[Tensor] | None = None
        if self.options.reference == "precomputed" and self._learner is not None:
            known = self._reference(self._learner.reference, pairs, 4096)
        return PairExamples(pairs, known, self)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        learner, origin = self._learner, self._origin
        mine = learner is not None and model in (learner, learner.policy)
        if mine and learner is not None:
            origin = learner.reference
        policy = model.policy if isinstance(model, Preference) else model
        pairs = [self._pair(row, place)[0] for place, row in placed(rows)]
        both = list(each_log_likelihood(policy, [side for pair in pairs for side in pair], batch_tokens))
        if not both:
            return
        sums, counts = torch.tensor(both, dtype=torch.float64).view(-1, 2, 2).unbind(-1)
        known = self._reference(origin, pairs, batch_tokens) if mine or origin is not None else None
        reference = None if known is None else torch.stack(known).double()
        if reference is None and self.loss.needs_reference:
            warnings.warn(
                "task 'preference': the model as it was before training is not at hand (a run's folder knows it, its "
                f"model alone does not); the margins of {self.loss.loss} compare the two answers' probabilities alone",
                stacklevel=2,
            )
        for margin in self.loss.margins(sums, counts, reference).tolist():
            yield {"margin": margin, "chosen": margin > 0}

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        """accuracy: how often the chosen answer is preferred; margin: the mean."""
        check_paired("preference", rows=rows, answers=answers)
        table = np.array([[answer["chosen"], answer["margin"], 1] for answer in answers], np.float64).reshape(-1, 3)
        scores = intervals(
            table,
            {"accuracy": lambda sums: sums[..., 0] / sums[..., 2], "margin": lambda sums: sums[..., 1] / sums[..., 2]},
        )
        return Judgement(scores, "accuracy", len(rows))

    def _pair(self, row: Row, place: str) -> tuple[list[dict[str, Tensor]], bool]:
        """Input ids and labels of the chosen and of the rejected answer, and whether they were cut."""
        prompt: Sequence[Message]
        if isinstance(row.get("prompt"), str) or "prompt" not in row:
            prompt = [{"role": "user", "content": text_of(self.name, row, place, "prompt")}]
        else:
            prompt = messages_of(self.name, row, place, "prompt")
        pair = []
        for side in SIDES:
            messages = [*prompt, {"role": ASSISTANT, "content": text_of(self.name, row, place, side)}]
            ids, replies = in_row(self.name, place, self.template.encode, messages, last_only=True)
            input_ids = torch.tensor(ids, dtype=torch.int64)
            pair.append({"input_ids": input_ids, "labels": torch.where(torch.tensor(replies), input_ids, IGNORED)})
        return self._cut(pair)

    def _cut(self, pair: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], bool]:
        excess = max(len(side["input_ids"]) for side in pair) - self.max_length
        if excess <= 0:
            return pair, False
        # a token of the prompt remains, for the answer's first to be predicted from
        prompts = [int((side["labels"] != IGNORED).int().argmax()) for side in pair]
        begin = max(0, min(excess, min(prompts) - 1))
        return [{name: x[begin : begin + self.max_length] for name, x in side.items()} for side in pair], True

    def _reference(
        self, origin: Transformer | None, pairs: Sequence[list[dict[str, Tensor]]], batch_tokens: int
    ) -> list[Tensor] | None:
        """(2,) of each pair; None where the loss has no reference, or it is gone and there are pairs that it did not
        read."""
        if not self.loss.needs_reference:
            return None
        keys = [b"|".join(side["input_ids"].numpy().tobytes() for side in pair) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        if new and origin is None:
            return None
        if new:
            assert origin is not None
            sides = [side for pair in new.values() for side in pair]
            found = torch.tensor([total for total, _ in each_log_likelihood(origin, sides, batch_tokens)])
            self._known |= zip(new, found.view(-1, 2), strict=True)
        return [self._known[key] for key in keys]


class PairExamples(TaskExamples):
    """Pairs, as `Preference` takes them. An example holds both sequences, the chosen one first."""

    def __init__(self, pairs: Sequence[list[dict[str, Tensor]]], known: list[Tensor] | None, task: Task) -> None:
        """known: the reference's log-probabilities (2,) of each pair."""
        made = [{name: torch.cat([side[name] for side in pair]) for name in ("input_ids", "labels")} for pair in pairs]
        for i, pair in enumerate(pairs):
            made[i]["chosen_tokens"] = torch.tensor(len(pair[0]["input_ids"]))
            if known is not None:
                made[i]["reference_sums"] = known[i]
        super().__init__(made, task)

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Any]:
        sides = []
        for example in examples:
            middle = int(example["chosen_tokens"])
            for part in (slice(middle), slice(middle, None)):
                sides.append({name: example[name][part] for name in ("input_ids", "labels")})
        packed = pack(sides)
        if "reference_sums" in examples[0]:
            packed["reference_sums"] = torch.stack([example["reference_sums"] for example in examples])
        return packed

    def items(self, micro_batch: dict[str, Any]) -> dict[str, int]:
        """sequences: pairs."""
        return super().items(micro_batch) | {"sequences": (len(micro_batch["cu_seqlens"]) - 1) // 2}
