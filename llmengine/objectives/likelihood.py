"""How probable a decoder finds the labelled tokens of each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmengine.data.examples import pack
from llmengine.models import Transformer
from llmengine.models.inputs import Tokens
from llmengine.models.layout import IGNORED
from llmengine.models.modes import evaluating


def log_likelihoods(model: Transformer, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """(sequences,) the sum of the log-probabilities of a sequence's labels, and (sequences,) int64 how many they are.

    inputs: a decoder's input_ids and what describes the batch: attention_mask, or cu_seqlens and max_seqlen. labels:
    like input_ids, -100 for tokens that do not count; the first token of a sequence never does, as none precedes it.
    The logits are never held.
    """
    assert model.token_head is not None
    out = model(**inputs, return_logits=False)
    layout = Tokens(
        inputs["input_ids"], inputs.get("attention_mask"), inputs.get("cu_seqlens"), inputs.get("max_seqlen")
    ).layout(model.config, causal=True)
    targets = layout.next_labels(labels)
    hidden = layout.enter(out.last_hidden_state)
    losses = model.token_head.each_loss(hidden, model.words.weight, targets)
    sequence = layout.sequence(torch.arange(len(targets), device=targets.device))
    sums = losses.new_zeros(layout.sequences).index_add(0, sequence, -losses)
    counts = torch.zeros_like(sums, dtype=torch.int64).index_add(0, sequence, (targets != IGNORED).long())
    return sums, counts


def each_log_likelihood(
    model: Transformer, examples: Sequence[dict[str, Tensor]], batch_tokens: int = 4096
) -> Iterator[tuple[float, int]]:
    """`log_likelihoods` of each example (input_ids and labels), in their order and without dropout; packs have up to
    batch_tokens tokens, a longer example is one alone."""
    batch: list[dict[str, Tensor]] = []
    for example in examples:
        if batch and sum(len(each["input_ids"]) for each in [*batch, example]) > batch_tokens:
            yield from _measured(model, batch)
            batch = []
        batch.append(example)
    if batch:
        yield from _measured(model, batch)


def _measured(model: Transformer, examples: list[dict[str, Tensor]]) -> list[tuple[float, int]]:
    with evaluating(model) as device:
        packed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in pack(examples).items()}
        sums, counts = log_likelihoods(model, **packed)
    return list(zip(sums.tolist(), counts.tolist(), strict=True))
