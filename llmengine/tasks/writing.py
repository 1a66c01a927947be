"""Tasks whose answers are texts: what they ask of rows and tokenizers, and how a model writes for many rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmengine.data.tokenizer import Tokenizer

WINDOW = 512  # rows that are sorted by length together: answers come in their order


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Options of how answers are written: greedily, or with `beams` > 1 by beam search, whose hypotheses are compared
    by log-probability over tokens ** length_penalty; or, with a temperature, drawn.

    no_repeat_ngram: no n-gram of so many tokens comes twice (0: off). repetition_penalty: logits of tokens that have
    been are divided by it (1: off). temperature: above 0, a token is drawn from softmax(logits / temperature) among the
    top_k most probable ones, and among the fewest that together have probability top_p; seed decides the draws.
    """

    longest: ClassVar[str]
    """The name of the option that limits an answer's tokens."""

    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fine, allowed in (
            ("beams", self.beams, self.beams >= 1, "1 or more"),
            ("no_repeat_ngram", self.no_repeat_ngram, self.no_repeat_ngram >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1: off)"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (no draws) or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "in [0, 2**63)"),
        ):
            if not fine:
                raise ValueError(f"task: {name} must be {allowed}, got {value}")
        if self.temperature > 0 and self.beams > 1:
            raise ValueError(f"task: beams ({self.beams}) search, temperature ({self.temperature}) draws; choose one")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("task: top_k and top_p are for draws; give a temperature above 0")

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Of `model.generate`."""
        found: dict[str, Any] = {
            "num_beams": self.beams,
            "length_penalty": self.length_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            draws = torch.Generator(device).manual_seed(self.seed)
            found |= {"do_sample": True, "temperature": self.temperature, "generator": draws}
            found |= {"top_k": self.top_k, "top_p": self.top_p}
        return found


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
    arguments = options.arguments(model.words.weight.device)
    for begin in range(0, len(prompts), WINDOW):
        window = prompts[begin : begin + WINDOW]
        found: dict[int, list[int]] = {}
        for rows in _batches([len(prompt) for prompt in window], new_tokens, batch_tokens, alike):
            texts = continued(model, [window[i] for i in rows], ends, new_tokens, **arguments)
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


def continued(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], new_tokens: int, **options: Any
) -> list[list[int]]:
    """`written` of one batch; `options` are those of `model.generate`. No ends: the model's own end a text."""
    device, longest = model.words.weight.device, max(map(len, prompts))
    reads_source, pad = model.config.architecture == "encoder_decoder", ends[0] if ends else 0
    ids, mask = torch.full((len(prompts), longest), pad), torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        # an encoder's positions may count columns; a decoder's new tokens follow the last column
        place = slice(len(prompt)) if reads_source else slice(longest - len(prompt), None)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    out = model.generate(
        ids.to(device), mask.to(device), new_tokens, eos_token_id=list(ends) or None, pad_token_id=pad, **options
    )
    new = out[:, 1 if reads_source else longest :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in new]
