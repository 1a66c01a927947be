"""What streams remember from one step to the next: Transformer-XL's memory, while training and while evaluating.

Each stream has its own, so that micro-batches of a step, and ranks that share a step's micro-batches, never meet each
other's: a rank that always takes the same ones (`step.micro_batches[rank::ranks]`, say) needs nothing of the others.
Memory is bounded by the model's memory_length for each stream of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmengine.data.streams import StreamPart
from llmengine.models.memory import Memory


class StreamMemory:
    """For each stream (layers, remembered tokens, d_model), on the model's device."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def call(self, model: Module, batch: Mapping[str, Any], parts: Sequence[StreamPart], **options: Any) -> Any:
        """The model's output for a micro-batch whose sequences are these parts of streams; remembers it."""
        out = model(**batch, **options, mems=self._recall(parts), use_mems=True)
        self._kept |= zip((part.stream for part in parts), out.mems.split(), strict=True)
        return out

    def _recall(self, parts: Sequence[StreamPart]) -> Memory | None:
        past = [self._kept[part.stream] if part.behind else None for part in parts]
        any_of_them = next((each for each in past if each is not None), None)
        return None if any_of_them is None else Memory.join(past, any_of_them[:, :0])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {str(stream): kept for stream, kept in self._kept.items()}

    def load_state(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of `state`."""
        self._kept = {int(stream): kept.to(device) for stream, kept in tensors.items()}
