"""Knowledge distillation (Hinton et al. 2015): a student learns what a teacher says, and how sure it is of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Embedding, Module

from llmengine.data.tokenizer import Tokenizer
from llmengine.models import Transformer, TransformerConfig
from llmengine.models.inputs import shift_packed, shift_right
from llmengine.models.output import TransformerOutput
from llmengine.objectives.distributions import check_has_distribution, judged

BATCH = ("labels", "start_positions", "end_positions")  # what a teacher is not told


class Distilled(Module):
    """loss = weight T^2 KL(teacher / T | student / T) + (1 - weight) the student's own loss.

    The divergence is over the tokens or sequences that have labels; T^2 makes up for what the temperature T does to
    gradients (section 2).
    The teacher is no submodule: neither parameters() nor state_dict() has it. It never drops out.
    """

    def __init__(
        self, student: Module, transformer: Transformer, teacher: Transformer, *, weight: float, temperature: float,
        order: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """student: what is trained, `transformer` or a module around it. order: which of the teacher's outputs is each
        of the student's; None: the same. Raises ValueError where the two do not judge the same things."""
        super().__init__()
        check_can_teach(teacher.config, transformer.config)
        self.student = student
        self.weight, self.temperature, self.order = weight, temperature, order
        self._models = (transformer, teacher.eval().requires_grad_(False))  # a tuple: no submodules

    @property
    def config(self) -> TransformerConfig:
        return self._models[0].config

    @property
    def words(self) -> Embedding:
        return self._models[0].words

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes the student."""
        self._models[0].save_pretrained(directory)

    def forward(self, *, num_items_in_batch: Mapping[str, Any] | None = None, **batch: Any) -> TransformerOutput:
        """A batch with labels, as the student takes it. losses: the student's own, and "distillation", both with their
        weights; their sum is the loss."""
        transformer, teacher = self._models
        out = self.student(**batch, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            told = teacher(**self._read(batch), return_logits=False)
            wanted = judged(teacher, told, batch)
        if self.order is not None:
            wanted = replace(wanted, logits=wanted.logits[:, list(self.order)])
        distance = wanted.divergence(judged(transformer, out, batch), num_items_in_batch, self.temperature)
        distilled = self.weight * self.temperature**2 * distance
        own = {head: (1 - self.weight) * loss for head, loss in out.losses.items()}
        return out.with_loss((1 - self.weight) * out.loss + distilled, {**own, "distillation": distilled})

    def _read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the teacher is told: what the student reads, a decoder's input too where it makes that of the labels."""
        read = {name: value for name, value in batch.items() if name not in BATCH}
        if self.config.token_task == "seq2seq" and "decoder_input_ids" not in batch:
            labels, bounds = batch["labels"], batch.get("decoder_cu_seqlens")
            shifted = shift_right(labels, self.config) if bounds is None else shift_packed(labels, self.config, bounds)
            read["decoder_input_ids"] = shifted
        return read


def check_can_teach(teacher: TransformerConfig, student: TransformerConfig) -> None:
    """That both read the same batches and judge the same things."""
    for config in (teacher, student):
        check_has_distribution(config, "distillation")
    names = ["architecture", "objectives"]
    if student.token_task is None:
        names += ["problem"] if "classification" in student.objectives else []
        names += ["n_labels"] if {"classification", "tagging"} & set(student.objectives) else []
    for name in names:
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(f"teacher: its {name} is {theirs!r}, the student's is {ours!r}; they must be the same")


def check_vocabulary(teacher: Tokenizer, student: Tokenizer) -> None:
    """That both read the same tokens. Raises ValueError naming one that they have not in common."""
    ours, theirs = student.backend.get_vocab(), teacher.backend.get_vocab()
    differ = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differ:
        token = differ[0]
        raise ValueError(
            f"teacher: its vocabulary is another one: {token!r} has the id {theirs.get(token)} there, "
            f"{ours.get(token)} in the student's ({len(differ):,} tokens differ); they must be the same"
        )
