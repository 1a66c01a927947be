"""NEFTune (Jain et al. 2023): uniform noise on the word embeddings while training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmengine.data.examples import lengths_of
from llmengine.models import Transformer
from llmengine.training.streams import seed_of


@dataclass(frozen=True)
class Neftune:
    """To each sequence of L tokens with d features, noise in (-1, 1) times alpha / sqrt(L d) (algorithm 1)."""

    model: Transformer
    alpha: float

    def stream(self, seed: int, *stream: int) -> NoiseStream:
        """One pass's over a step."""
        return NoiseStream(self, (seed, *stream))


@dataclass(frozen=True)
class NoiseStream:
    """Each sequence's noise depends on the stream and its number in the step alone, not on its micro-batch."""

    noise: Neftune
    seeds: tuple[int, ...]

    @contextmanager
    def over(self, batch: Mapping[str, Any], first: int) -> Iterator[None]:
        """While entered the model reads this micro-batch; `first`: the number of its first sequence."""
        model, calls = self.noise.model, 0
        sides = ("", "decoder_") if model.config.architecture == "encoder_decoder" else ("",)

        def add(module: Module, ids: tuple[Tensor, ...], x: Tensor) -> Tensor:
            nonlocal calls
            side, call = sides[calls % len(sides)], calls
            # a decoder without a target of its own reads the source
            lengths = lengths_of(batch, side if f"{side}input_ids" in batch else "")
            calls += 1  # both sides of an encoder-decoder, and each pass over a micro-batch, have noise of their own
            return x + self._of(x, lengths, call, first)

        handle = model.words.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _of(self, x: Tensor, lengths: list[int], call: int, first: int) -> Tensor:
        features = x.shape[-1]
        if sum(lengths) * features != x.numel():
            raise ValueError(
                f"neftune: the model reads {x.numel() // features} tokens where the batch's sequences have "
                f"{sum(lengths)}; padding between tokens does not go with it"
            )
        generator = torch.Generator(x.device)
        parts = []
        for i, length in enumerate(lengths):
            generator.manual_seed(seed_of(*self.seeds, call, first + i))
            drawn = torch.rand(length, features, generator=generator, device=x.device)
            parts.append((2 * drawn - 1) * (self.noise.alpha / (length * features) ** 0.5))
        return torch.cat(parts).view(x.shape).to(x.dtype)
