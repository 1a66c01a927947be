"""Held-out loss per head, perplexity, and the accuracy of hidden tokens and sentence pairs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from llmengine.data.batches import StepBatches
from llmengine.data.examples import IGNORED
from llmengine.models import Transformer

PAIRS = ("nsp", "sop")  # heads whose loss is a mean over sequences; that of the others over tokens


@torch.no_grad()
def evaluate(model: Transformer, batches: StepBatches, device: torch.device, precision: str) -> dict[str, Any]:
    """One pass over `batches`' first epoch, without dropout; the model's mode is left as it was.

    Returns {"loss": sum of the heads', "losses": {head: mean over all labels}, "perplexity": exp of the token head's
    loss, "accuracy": {"mlm", "plm", "nsp", "sop"}: those that the model has}.
    """
    was_training = model.training
    model.eval()
    totals: Counter[str] = Counter()
    items: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for step in range(batches.steps_per_epoch):
        packed = batches[step]
        for batch in packed.micro_batches:
            batch = on(device, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = model(**batch, num_items_in_batch={"tokens": 1, "sequences": 1})
                right.update(_right(model, batch, out))
            totals.update({head: float(loss) for head, loss in out.losses.items()})
        items.update(packed.items)
    model.train(was_training)
    counts = {head: max(items["sequences" if head in PAIRS else "tokens"], 1) for head in totals}
    losses = {head: total / counts[head] for head, total in totals.items()}
    tokens = next(loss for head, loss in losses.items() if head not in PAIRS)
    accuracy = {head: right[head] / counts[head] for head in losses if head not in ("clm", "seq2seq")}
    result: dict[str, Any] = {"loss": sum(losses.values()), "losses": losses, "perplexity": math.exp(min(tokens, 700))}
    return result | ({"accuracy": accuracy} if accuracy else {})


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch's tensors on that device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _right(model: Transformer, batch: dict[str, Any], out: Any) -> dict[str, int]:
    """How many labels each head guesses, but those that write a text. The token head sees labelled tokens only."""
    right = {}
    task = model.config.token_task
    if task in ("mlm", "plm") and task in out.losses and model.token_head is not None:
        labelled = (batch["labels"] != IGNORED).nonzero().squeeze(1)
        hidden = out.last_hidden_state[labelled]
        guesses = model.token_head(hidden, model.words.weight).argmax(-1)
        right[task] = int((guesses == batch["labels"][labelled]).sum())
    for head, name in zip(PAIRS, ("next_sentence_label", "sentence_order_label"), strict=True):
        if head in out.losses:
            right[head] = int((out.head_logits[head].argmax(-1) == batch[name]).sum())
    return right
