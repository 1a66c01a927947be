"""The gradient that Hugging Face's Trainer hands to the optimizer."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .cases import Example, collect


class _Reader(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = collect(model)


def of_trainer(model: torch.nn.Module, rows: list[Example]) -> dict[str, Tensor]:
    """Of a step of len(rows) micro-batches of one row each, without clipping. The weights stay as they are."""
    reader = _Reader()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=1, gradient_accumulation_steps=len(rows), max_steps=1,
            max_grad_norm=0.0, learning_rate=0.0, optim="sgd", use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[reader])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.zero_grad()
    return reader.gradients
