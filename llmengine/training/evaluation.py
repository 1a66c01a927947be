"""Held-out loss per head, perplexity, and the accuracy of hidden tokens and sentence pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmengine.data.batches import StepBatches
from llmengine.data.examples import IGNORED
from llmengine.models import Transformer
from llmengine.objectives.electra import Electra

PAIRS = ("nsp", "sop")  # heads whose loss is a mean over sequences


@torch.no_grad()
def evaluate(
    model: Transformer | Electra, batches: StepBatches, device: torch.device, precision: str
) -> dict[str, Any]:
    """One pass over `batches`' first epoch, without dropout; the model's mode is left as it was.

    Returns {"loss": the heads' weighted sum, "losses": {head: mean over all labels}, "perplexity": exp of the token
    head's loss, "accuracy": {"mlm", "plm", "nsp", "sop"}: those that the model has}.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # a model may draw samples: the same ones in every evaluation
        totals, items, right = _pass(model, batches, device, precision)
    model.train(was_training)
    counts = {head: max(items[_counted(head)], 1) for head in totals}
    losses = {head: total / counts[head] for head, total in totals.items()}
    tokens = next(loss for head, loss in losses.items() if head not in (*PAIRS, "rtd"))
    accuracy = {head: count / counts[head] for head, count in right.items()}
    result: dict[str, Any] = {"loss": weighted(model, losses), "losses": losses}
    result["perplexity"] = math.exp(min(tokens, 700))
    return result | ({"accuracy": accuracy} if accuracy else {})


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
    for step in range(batches.steps_per_epoch):
        packed = batches[step]
        for batch in packed.micro_batches:
            batch = on(device, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = model(**batch, num_items_in_batch={"tokens": 1, "sequences": 1, "read": 1})
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
    return right
