"""Hugging Face's Trainer accumulates our heads exactly, wherever it tells the model how many labels a step has."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, distance, gradients, packed, padded
from .trainer import of_trainer

# of each head two families, one of them a decoder where there is one: Trainer counts a causal loss's labels otherwise
DRIVEN = [
    case
    for case in CASES
    if case.family in ("bert", "gpt2", "bart", "xlnet" if case.head == "plm" else "")
    and case.head not in ("nsp", "qa", "classification-multi", "classification-regression")
]


def rows_of(case, examples):
    """Without labels on padding: Trainer would count them."""
    batch = padded(case, examples, "right")
    if case.head not in ("plm", "choice", "classification-single"):
        mask = batch["decoder_attention_mask" if case.seq2seq else "attention_mask"]
        batch["labels"] = torch.where(mask == 1, batch["labels"], -100)
    return [{name: x[i] for name, x in batch.items()} for i in range(len(examples))]


@pytest.mark.parametrize("case", DRIVEN, ids=lambda case: case.name)
def test_eight_micro_batches_of_trainer_are_one_batch(case):
    model, examples = case.model(torch.float32), case.examples()
    assert model.accepts_loss_kwargs
    whole = gradients(model, [packed(case, examples)])
    assert distance(of_trainer(model, rows_of(case, examples)), whole) < 3e-6


@pytest.mark.parametrize("case", [c for c in DRIVEN if c.family != "bart"], ids=lambda case: case.name)
def test_a_step_of_trainer_without_any_label(case):
    """Trainer then counts 0 labels."""
    model = case.model(torch.float32)
    found = of_trainer(model, rows_of(case, case.without_labels()))
    assert not any(gradient.any() for gradient in found.values())
