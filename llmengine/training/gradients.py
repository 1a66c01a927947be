"""A step's gradients, from however many micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import Module

from llmengine.data.batches import Step
from llmengine.data.examples import lengths_of
from llmengine.training.evaluation import on
from llmengine.training.memory import StreamMemory
from llmengine.training.regularisers.neftune import NoiseStream


def accumulate(
    model: Module, batch: Step, device: torch.device, precision: str, noise: NoiseStream | None = None,
    memory: StreamMemory | None = None,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Adds a step's gradients to the parameters'; returns the loss and each head's: means over all labels of the step.

    The sums of the micro-batches are divided by the step's counts, so that how it is cut into them changes nothing.
    noise: what is added to the embeddings. memory: of streams, where the step reads them.
    """
    total: Any = 0.0
    losses: dict[str, Any] = {}
    first = 0  # the micro-batch's first sequence, of the step's
    for i, given in enumerate(batch.micro_batches):
        micro_batch = on(device, given)
        noisy = nullcontext() if noise is None else noise.over(given, first)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), noisy:
            if memory is None or batch.streams is None:
                out = model(**micro_batch, num_items_in_batch=batch.items)
            else:
                out = memory.call(model, micro_batch, batch.streams[i], num_items_in_batch=batch.items)
        out.loss.backward()
        total = total + out.loss.detach()
        for head, loss in out.losses.items():
            losses[head] = losses.get(head, 0) + loss.detach()
        first += len(lengths_of(given))
    return float(total), {head: float(loss) for head, loss in losses.items()}
