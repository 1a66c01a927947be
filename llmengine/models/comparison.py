"""Two models side by side on the same tokens: how far their hidden states are from each other, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.models.transformer import Transformer


@dataclass(frozen=True)
class Difference:
    """Between one tensor of the first model and the second's."""

    name: str
    """Where: "encoder.embeddings", "decoder.layers.3", "logits"."""
    largest: float
    """Absolute difference of an element; NaN where either model gave one."""
    magnitude: float
    """Of the first model's largest element."""

    def exceeds(self, tolerance: float) -> bool:
        """Beyond tolerance times the magnitude, or times 1 for small tensors. NaN exceeds all tolerances."""
        return not self.largest <= tolerance * max(1.0, self.magnitude)


def random_tokens(models: Sequence[Transformer], sequences: int, length: int, seed: int) -> Tensor:
    """Ids that every one of the models knows, (sequences, length), or shorter where a model's positions end before."""
    limits = [model.config.max_positions for model in models if model.config.max_positions is not None]
    vocabulary = min(min(model.config.vocab_size, model.config.source_vocab_size) for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, min([length, *limits])), generator=generator)


@torch.no_grad()
def compare(
    a: Transformer, b: Transformer, input_ids: Tensor, decoder_input_ids: Tensor | None = None
) -> list[Difference]:
    """The differences in the order of computation, of what both models have: hidden states, then what heads give.

    decoder_input_ids: an encoder-decoder's; default input_ids. Raises ValueError where the models have not the same
    stacks of layers.
    """
    for name in ("architecture", "n_layers", "decoder_layers", "d_model"):
        first, second = getattr(a.config, name), getattr(b.config, name)
        if first != second:
            raise ValueError(f"compare: {name} is {first!r} in the first model and {second!r} in the second")
    inputs = {"input_ids": input_ids}
    if a.config.architecture == "encoder_decoder":
        inputs["decoder_input_ids"] = input_ids if decoder_input_ids is None else decoder_input_ids
    first, second = (dict(_tensors(model, inputs)) for model in (a, b))
    return [_difference(name, x, second[name]) for name, x in first.items() if name in second]


def _tensors(model: Transformer, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    out = model(**inputs, output_hidden_states=True)
    if out.encoder_hidden_states is not None:
        yield from _stack("encoder", out.encoder_hidden_states)
    assert out.hidden_states is not None  # asked for
    yield from _stack("encoder" if model.decoder is None else "decoder", out.hidden_states)
    if out.pooler_output is not None:
        yield "pooler", out.pooler_output
    if model.token_head is not None:
        assert out.logits is not None
        yield "logits", out.logits
    for objective, logits in out.head_logits.items():
        yield f"{objective} logits", logits


def _stack(side: str, states: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The last state is the stack's result: after the final norm, where there is one."""
    for i, state in enumerate(states):
        yield f"{side}.layers.{i - 1}" if i else f"{side}.embeddings", state


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    if a.shape != b.shape:  # vocabularies or numbers of labels differ: what both have
        a, b = a[..., : b.shape[-1]], b[..., : a.shape[-1]]
    return Difference(name, float((a - b).abs().max()), float(a.abs().max()))
