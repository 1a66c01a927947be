"""Tasks whose answers are texts: what they ask of rows and tokenizers, and how a model writes for many rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmengine.data.tokenizer import Tokenizer

WINDOW = 512  # rows that are sorted by length together: answers come in their order


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Options of how answers are written: greedily, or with `beams` > 1 by beam search, whose hypotheses are compared
    by log-probability over tokens ** length_penalty.

    no_repeat_ngram: no n-gram of so many tokens comes twice (0: off). repetition_penalty: logits of tokens that have
    been are divided by it (1: off).
    """

    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("beams", self.beams, 1), ("no_repeat_ngram", self.no_repeat_ngram, 0)):
            if value < least:
                raise ValueError(f"task: {name} must be {least} or more, got {value}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"task: repetition_penalty must be above 0 (1: off), got {self.repetition_penalty}")


def end_of(task: str, tokenizer: Tokenizer) -> int:
    """The token that ends a text: eos, or sep where there is none."""
    for end in (tokenizer.eos_id, tokenizer.sep_id):
        if end is not None:
            return end
    raise ValueError(f"task {task!r}: the tokenizer has neither an eos nor a sep token to end a text with")


def written(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], *, new_tokens: int, options: Writing,
    batch_tokens: int,
) -> Iterator[list[int]]:  # fmt: skip
    """What the model writes for each prompt, in their order: token ids up to the first of `ends`, without it.

    prompts: an encoder-decoder's sources, or what a decoder goes on with. new_tokens: the most of each. Prompts of
    similar length go together, as many as keep prompts and answers within batch_tokens; dropout is off.
    """
    if batch_tokens < 1:
        raise ValueError(f"task: batch_tokens must be 1 or more, got {batch_tokens}")
    reads_source = model.config.architecture == "encoder_decoder"
    # a decoder's n-grams would be those of padding too
    alike = not reads_source and options.no_repeat_ngram > 0
    for begin in range(0, len(prompts), WINDOW):
        window = prompts[begin : begin + WINDOW]
        found: dict[int, list[int]] = {}
        for rows in _batches([len(prompt) for prompt in window], new_tokens, batch_tokens, alike):
            texts = _write(model, [window[i] for i in rows], ends, new_tokens, options)
            found.update(zip(rows, texts, strict=True))
        yield from (found[i] for i in range(len(window)))


def _batches(lengths: Sequence[int], new_tokens: int, limit: int, alike: bool) -> Iterator[list[int]]:
    """Rows, the longest first, in batches of at most `limit` tokens with padding; a longer row alone. alike: only
    equally long rows share a batch."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batch and (len(batch) + 1) * (lengths[batch[0]] + new_tokens) > limit
        if full or (batch and alike and lengths[i] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _write(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], new_tokens: int, options: Writing
) -> list[list[int]]:
    device, longest = model.words.weight.device, max(map(len, prompts))
    reads_source = model.config.architecture == "encoder_decoder"
    ids, mask = torch.full((len(prompts), longest), ends[0]), torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        # an encoder's positions may count columns; a decoder's new tokens follow the last column
        place = slice(len(prompt)) if reads_source else slice(longest - len(prompt), None)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    out = model.generate(
        ids.to(device), mask.to(device), new_tokens, eos_token_id=list(ends), pad_token_id=ends[0],
        num_beams=options.beams, length_penalty=options.length_penalty, no_repeat_ngram_size=options.no_repeat_ngram,
        repetition_penalty=options.repetition_penalty,
    )  # fmt: skip
    new = out[:, 1 if reads_source else longest :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in new]
