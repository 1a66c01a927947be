"""Held-out loss per head, perplexity, and the accuracy of hidden tokens and sentence pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmengine.data.batches import StepBatches
from llmengine.data.examples import IGNORED
from llmengine.models import Transformer
from llmengine.models.modes import resting
from llmengine.objectives.electra import Electra
from llmengine.training.memory import StreamMemory

PAIRS = ("nsp", "sop")  # heads whose loss is a mean over sequences


def evaluate(
    model: Transformer | Electra, batches: StepBatches, device: torch.device, precision: str
) -> dict[str, Any]:
    """One pass over `batches`' first epoch, without dropout; the model's mode is left as it was.

    Streams are read with a memory that begins empty and is gone afterwards: training's has no part in it.

    Returns {"loss": the heads' weighted sum, "losses": {head: mean over all labels}, "perplexity": exp of the token
    head's loss, "accuracy": {"mlm", "plm", "nsp", "sop", "rtd" (of all tokens)}: those that the model has}.
    """
    with without_dropout(model, device):
        totals, items, right = _pass(model, batches, device, precision)
    counts = {head: max(items[_counted(head)], 1) for head in totals}
    losses = {head: total / counts[head] for head, total in totals.items()}
    tokens = next(loss for head, loss in losses.items() if head not in (*PAIRS, "rtd"))
    accuracy = {head: count / counts[head] for head, count in right.items()}
    result: dict[str, Any] = {"loss": weighted(model, losses), "losses": losses}
    result["perplexity"] = math.exp(min(tokens, 700))
    return result | ({"accuracy": accuracy} if accuracy else {})


@contextmanager
def without_dropout(model: Module, device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """While entered the model does not train; what it draws is the same each time. bf16: under autocast."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    kept = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with resting(model), torch.no_grad(), autocast, kept:
        torch.manual_seed(0)
        yield


def mean_losses(model: Module, batches: StepBatches, device: torch.device) -> tuple[float, dict[str, float]]:
    """The loss and its parts over `batches`' first epoch: means over all labels, whatever each loss counts."""
    micro_batches = [batch for i in range(batches.steps_per_epoch) for batch in batches[i].micro_batches]
    counted: Counter[str] = Counter()
    for batch in micro_batches:
        counted.update(batches.examples.items(batch))
    items = {name: max(1, count) for name, count in counted.items()}
    total, losses = 0.0, Counter[str]()
    for batch in micro_batches:
        out = model(**on(device, batch), num_items_in_batch=items)
        total += float(out.loss)
        losses.update({head: float(loss) for head, loss in out.losses.items()})
    return total, dict(losses)


def weighted(model: Transformer | Electra, losses: Mapping[str, float]) -> float:
    """The loss that is trained: the heads' with their weights."""
    weights = model.config.loss_weights
    return sum(weights.get(head, 1.0) * loss for head, loss in losses.items())


def _counted(head: str) -> str:
    """What a head's loss is a mean over."""
    return "sequences" if head in PAIRS else "read" if head == "rtd" else "tokens"


def _pass(
    model: Transformer | Electra, batches: StepBatches, device: torch.device, precision: str
) -> tuple[Counter[str], Counter[str], dict[str, int]]:
    """Each head's summed loss, what it is divided by, and how many labels it guesses."""
    totals: Counter[str] = Counter()
    items: Counter[str] = Counter()
    right: Counter[str] = Counter()
    memory, summed = StreamMemory(), {"tokens": 1, "sequences": 1, "read": 1}
    for step in range(batches.steps_per_epoch):
        packed = batches[step]
        for i, batch in enumerate(packed.micro_batches):
            batch = on(device, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                if packed.streams is None:
                    out = model(**batch, num_items_in_batch=summed)
                else:
                    out = memory.call(model, batch, packed.streams[i], num_items_in_batch=summed)
                right.update(_right(model, batch, out))
            totals.update({head: float(loss) for head, loss in out.losses.items()})
        items.update(packed.items)
    return totals, items, right


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch's tensors on that device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _right(model: Transformer | Electra, batch: dict[str, Any], out: Any) -> dict[str, int]:
    """How many labels each head guesses, but those that write a text. The token head sees labelled tokens only."""
    right = {}
    task = model.config.token_task
    if isinstance(model, Transformer) and task in ("mlm", "plm") and model.token_head is not None:
        labelled = (batch["labels"] != IGNORED).nonzero().squeeze(1)
        hidden = out.last_hidden_state[labelled]
        guesses = model.token_head(hidden, model.words.weight).argmax(-1)
        right[task] = int((guesses == batch["labels"][labelled]).sum())
    for head, name in zip(PAIRS, ("next_sentence_label", "sentence_order_label"), strict=True):
        if head in out.losses:
            right[head] = int((out.head_logits[head].argmax(-1) == batch[name]).sum())
    if "rtd" in out.losses:
        # padding counts neither as replaced nor as original
        right["rtd"] = int(torch.where(out.logits > 0, out.replaced == 1, out.replaced == 0).sum())
    return right
