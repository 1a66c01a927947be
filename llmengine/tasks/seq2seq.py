"""A text from a text: translation, summaries, corrections, ... by an encoder-decoder, or by a decoder that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmengine import metrics
from llmengine.data.examples import IGNORED, pack
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement
from llmengine.tasks.rows import placed, tell, text_of
from llmengine.tasks.task import Answer, Row, Task, TaskExamples
from llmengine.tasks.writing import Writing, end_of, written

ARCHITECTURES = {"encoder_decoder": "seq2seq", "decoder": "clm"}  # and the head of each


@dataclass(frozen=True, kw_only=True)
class Seq2SeqOptions(Writing):
    """Options of writing, and

    architecture: "encoder_decoder"; or "decoder": source, separator and target are one text.
    prefix: what every source begins with, as T5's "translate English to German: ".
    separator: what a decoder reads between source and target.
    max_target_length: the most tokens of a target, its end included, and of an answer. None: max_length; for a decoder,
        whose max_length holds both, half of it.
    start: the token that an encoder-decoder's target begins with, as mBART's "de_DE"; None: what the model's config
        says.
    """

    longest: ClassVar[str] = "max_target_length"
    architecture: str = "encoder_decoder"
    prefix: str = ""
    separator: str = "\n"
    max_target_length: int | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"task 'seq2seq': architecture {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}"
            )
        if self.max_target_length is not None and self.max_target_length < 2:
            raise ValueError(f"task 'seq2seq': max_target_length must be 2 or more, got {self.max_target_length}")
        if self.start is not None and self.architecture == "decoder":
            raise ValueError("task 'seq2seq': start is for encoder-decoders; a decoder goes on with its source")


class Seq2Seq(Task):
    """An encoder-decoder reads the source as the tokenizer's template has it, and writes the target: the template's
    tokens before a text, if any, the text, and eos (sep, where the tokenizer has none). A decoder reads those before a
    text, the source and the separator, and goes on with the target and its end; only these have labels.

    What is too long is cut at its end, and told. Special tokens written out in a row are text; in prefix and separator
    they are tokens.
    """

    name = "seq2seq"
    objective = "seq2seq"
    columns: ClassVar[dict[str, str]] = {
        "source": "the text that is read",
        "target": "the text that is to be written",
    }
    asked = ("source",)
    Options = Seq2SeqOptions

    def __init__(self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: Seq2SeqOptions) -> None:
        super().__init__(tokenizer, max_length, labels, options)
        self.objective = ARCHITECTURES[options.architecture]
        self._decoder = options.architecture == "decoder"
        self._before, self._behind = tokenizer.template().sides
        control, self._prefix = _parted(options.prefix, tokenizer)
        self._ahead = [*self._before, *tokenizer.encode(control)]
        self._end = end_of(self.name, tokenizer)
        self.max_target_length = options.max_target_length or (max_length // 2 if self._decoder else max_length)
        room = max_length
        if self._decoder:
            self._behind = tokenizer.encode(options.separator)
            room -= self.max_target_length
            if options.separator and not self._behind:
                raise ValueError(
                    f"task 'seq2seq': separator {options.separator!r} gives no token of this tokenizer; choose another"
                )
        self._room = room - len(self._ahead) - len(self._behind)
        # a target needs a token and its end, and an encoder-decoder's those before a text
        if self._room < 1 or self.max_target_length < 2 + (0 if self._decoder else len(self._before)):
            raise ValueError(
                f"task 'seq2seq': max_length {max_length} and max_target_length {self.max_target_length} leave no room "
                "for a token of source and target beside special tokens; give more"
            )

    def model_fields(self) -> dict[str, Any]:
        if self.options.start is None:
            return {}
        start = self.tokenizer.backend.token_to_id(self.options.start)
        if start is None:
            raise ValueError(f"task 'seq2seq': start {self.options.start!r} is not in the tokenizer's vocabulary")
        return {"decoder_start_token_id": start}

    def wrap(self, model: Any) -> Any:
        self._check(model)
        return model

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> TaskExamples:
        sources, cut_sources = self._sources(rows)
        texts = self.tokenizer.encode_many([text_of(self.name, row, place, "target") for place, row in placed(rows)])
        before = [] if self._decoder else self._before
        room = self.max_target_length - len(before) - 1
        targets = [[*before, *ids[:room], self._end] for ids in texts]
        self._tell(len(rows), source=cut_sources, target=sum(len(ids) > room for ids in texts))
        if self._decoder:
            return TaskExamples([_continued(*pair) for pair in zip(sources, targets, strict=True)], self)
        return SourcesAndTargets(list(zip(sources, targets, strict=True)), self)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        self._check(model)
        sources, cut = self._sources(rows)
        self._tell(len(rows), source=cut)
        new_tokens, most = self.max_target_length, model.config.max_positions
        if not self._decoder and most is not None:
            new_tokens = min(new_tokens, most - 1)  # the first is the start
        for ids in written(model, sources, [self._end], new_tokens=new_tokens, options=self.options,
                           batch_tokens=batch_tokens):  # fmt: skip
            yield {"text": self.tokenizer.decode(ids)}

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        references = [text_of(self.name, row, place, "target") for place, row in placed(rows)]
        return metrics.texts([answer["text"] for answer in answers], references)

    def _sources(self, rows: Sequence[Row]) -> tuple[list[list[int]], int]:
        """What the model reads of each row, and how many were cut."""
        block = placed(rows)
        texts = [self._prefix + text_of(self.name, row, place, "source") for place, row in block]
        encoded = self.tokenizer.encode_many(texts)
        sources = [[*self._ahead, *ids[: self._room], *self._behind] for ids in encoded]
        if [] in sources:
            raise ValueError(f"task 'seq2seq': {block[sources.index([])][0]}: source is empty; expected a text")
        return sources, sum(len(ids) > self._room for ids in encoded)

    def _tell(self, rows: int, **cut: int) -> None:
        for column, count in cut.items():
            most = self.max_target_length if column == "target" else self._room
            tell(
                self.name, count, rows, f"{column}s are longer than the {most} tokens that fit, and are cut at the end"
            )

    def _check(self, model: Any) -> None:
        """That the model is one for these options."""
        config = model.config
        if config.token_task != self.objective:
            raise ValueError(
                f"task 'seq2seq': architecture is {self.options.architecture!r}, but the model is a "
                f"{config.architecture} with {list(config.objectives)}"
            )
        if not self._decoder and config.decoder_start_token_id is None:
            raise ValueError("task 'seq2seq': the model has no decoder_start_token_id; name the token: option start")


class SourcesAndTargets(TaskExamples):
    """Sources and targets; the model makes the decoder's input of the labels."""

    architecture = "encoder_decoder"

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], task: Task) -> None:
        super().__init__([{"input_ids": torch.tensor(a), "labels": torch.tensor(b)} for a, b in pairs], task)
        self._lengths += [len(target) for _, target in pairs]

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Any]:
        lengths = torch.tensor([0] + [len(example["labels"]) for example in examples])
        shape = {"decoder_cu_seqlens": lengths.cumsum(0).to(torch.int32), "decoder_max_seqlen": int(lengths.max())}
        return pack(examples) | shape


def _parted(prefix: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """A prefix up to its last special token, and the rest, which is one text with what follows."""
    special = map(tokenizer.token, tokenizer.special_ids)
    end = max((prefix.rfind(token) + len(token) for token in special if token in prefix), default=0)
    return prefix[:end], prefix[end:]


def _continued(prompt: Sequence[int], target: Sequence[int]) -> dict[str, Tensor]:
    """One text of a decoder, of which the target has labels."""
    labels = torch.tensor([IGNORED] * len(prompt) + list(target))
    return {"input_ids": torch.tensor([*prompt, *target]), "labels": labels}
