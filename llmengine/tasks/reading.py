"""Tasks whose answers are read off a text: what they ask of rows, how texts become inputs, a model's outputs for many.

A text is tokenised and put together as transformers' tokenizers of the same files do it, token types included; but a
special token that is written out in it is text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from llmengine.data.batches import fill
from llmengine.data.examples import IGNORED, pack, tokens_of
from llmengine.data.template import Inputs, longest_first
from llmengine.data.tokenizer import Tokenizer
from llmengine.models.modes import evaluating
from llmengine.tasks.rows import placed
from llmengine.tasks.task import Row, Task, TaskExamples

ROWS = 1024  # that are read before the first of their answers is given
Example = dict[str, Tensor]


class Reading(Task):
    """A task whose examples are texts in the tokenizer's template."""

    pairs: ClassVar[bool] = True
    """Whether an example may have two texts."""
    limit: ClassVar[str] = "max_length"
    """What texts are cut to."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: Any) -> None:
        super().__init__(tokenizer, max_length, labels, options)
        self.templates = (tokenizer.template(), tokenizer.template(pair=True))
        self.reads_types = tokenizer.token_types
        """Whether examples have token types: those of a tokenizer that knows them, for a model that has them."""
        least = self.templates[self.pairs].added + 1 + self.pairs
        if max_length < least:
            raise ValueError(
                f"task {self.name!r}: max_length must be {least} or more (special tokens and a token of each text), "
                f"got {max_length}"
            )

    def wrap(self, model: Any) -> Any:
        self.check(model)
        config = model.config
        self.reads_types = self.tokenizer.token_types and (config.type_vocab_size > 1 or config.positions == "relative")
        return model

    def check(self, model: Any) -> None:
        """That the model has this task's head."""
        config = model.config
        if self.objective not in config.objectives:
            raise ValueError(
                f"task {self.name!r}: the model lacks objective {self.objective!r}; it has {list(config.objectives)}"
            )
        for name, wanted in self.model_fields().items():
            found = getattr(config, name)
            if found != wanted and not (name == "labels" and found is None):
                raise ValueError(f"task {self.name!r}: the model's {name} is {found!r}, the task's {wanted!r}")

    def fitted(self, text: Sequence[int], pair: Sequence[int] | None = None) -> tuple[Inputs, bool]:
        """`inputs` of at most max_length tokens, and whether texts were cut: of two the longer one until both are as
        long, then both."""
        lengths = len(text), len(pair or ())
        kept = longest_first(*lengths, self.max_length - self.templates[pair is not None].added)
        return self.inputs(text[: kept[0]], *([] if pair is None else [pair[: kept[1]]])), kept != lengths

    def inputs(self, *texts: Sequence[int]) -> Inputs:
        """Ids of one text or two in their template. Where nothing is left of a text, and the template adds nothing, a
        token that ends or begins texts stands for it."""
        made = self.templates[len(texts) - 1].around(*texts)
        if made.ids:
            return made
        tokenizer = self.tokenizer
        for token in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id):
            if token is not None:
                return Inputs([token], [0], made.starts)
        raise ValueError(f"task {self.name!r}: a text gives no token, and the tokenizer has no special token for it")

    def example(self, inputs: Inputs, **labels: Tensor) -> Example:
        """Inputs, with their labels if there are any, as tensors."""
        types = {"token_type_ids": torch.tensor(inputs.types)} if self.tokenizer.token_types else {}
        return {"input_ids": torch.tensor(inputs.ids), **types, **labels}

    def collate(self, examples: list[Example]) -> dict[str, Any]:
        """A packed batch."""
        if not self.reads_types:
            examples = [{name: x for name, x in each.items() if name != "token_type_ids"} for each in examples]
        return pack(examples)

    @property
    def cut(self) -> str:
        """What is told of rows that are too long."""
        return f"rows have more text than {self.limit} {getattr(self, self.limit)}; it was cut at its end"

    def outputs(
        self,
        model: Any,
        examples: Sequence[Example],
        read: Callable[[Any, dict[str, Any]], Sequence[Tensor]],
        batch_tokens: int,
    ) -> list[Tensor]:
        """What `read` makes of the model's output for a batch, a value for each example, in their order.

        Examples of similar lengths share a batch of at most batch_tokens tokens (a longer one has its own). No dropout,
        no gradients; the model's mode is left as it was. ValueError where values are not finite: no answer follows.
        """
        if batch_tokens < 1:
            raise ValueError(f"task {self.name!r}: batch_tokens must be 1 or more, got {batch_tokens}")
        if not examples:
            return []
        found: dict[int, Tensor] = {}
        lengths = np.array([tokens_of(example) for example in examples])
        order = np.argsort(lengths, kind="stable")
        ends, _ = fill(lengths[order], max(batch_tokens, int(lengths.max())), 1)
        with evaluating(model) as device:
            for begin, end in pairwise([0, *ends.tolist()]):
                batch = self.collate([examples[i] for i in order[begin:end]])
                batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                values = read(model(**batch), batch)
                if not all(bool(value.isfinite().all()) for value in values):
                    raise ValueError(
                        f"task {self.name!r}: the model's outputs are NaN or infinite; its training diverged, or its "
                        "weights are damaged"
                    )
                found.update(zip(order[begin:end].tolist(), values, strict=True))
        return [found[i] for i in range(len(examples))]


class ReadingExamples(TaskExamples):
    """Packed batches of a task's examples. truncated: how many rows were cut."""

    def __init__(self, made: Sequence[Example], task: Reading, truncated: int = 0) -> None:
        super().__init__(made, task)
        self.task, self.truncated = task, truncated

    def collate(self, examples: list[Example]) -> dict[str, Any]:
        return self.task.collate(examples)


class SequenceExamples(ReadingExamples):
    """Examples whose losses are means over sequences. `counted` is what has a value for each."""

    counted: ClassVar[str] = "labels"

    def items(self, micro_batch: dict[str, Any]) -> dict[str, int]:
        labels = micro_batch[self.counted]
        if labels.dim() > 1:  # several numbers of each sequence
            return {"sequences": len(labels)}
        return {"sequences": int((labels != IGNORED).sum())}


def by_sequence(values: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """A packed batch's values (tokens, ...) sequence by sequence, in float32 on the CPU."""
    return list(values.float().cpu().split(batch["cu_seqlens"].diff().tolist()))


def blocks(rows: Sequence[Row]) -> Iterator[list[tuple[str, Row]]]:
    """Rows with their places, some at a time."""
    for begin in range(0, len(rows), ROWS):
        yield placed(rows[begin : begin + ROWS], begin)
