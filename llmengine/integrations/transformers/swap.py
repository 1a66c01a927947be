"""accelerate, explain, restore: goes over a model and puts in what stands in for its parts."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from llmengine.integrations.transformers import attention, feed_forward, layers, logits, norms
from llmengine.integrations.transformers.stand_in import disproof, put_in, take_out

Model = TypeVar("Model", bound=Module)
# What a reader would look for in the report, though no stand-in has its shape.
EXPECTED = re.compile("norm|mlp|feedforward|ffn|dense.*act|expert", re.IGNORECASE)


@dataclass
class Report:
    """What stands in where, and what was left and why: reason -> names of modules. `attention`: as it was before."""

    swapped: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    attention: list[tuple[str, str]] = field(default_factory=list)

    def swap(self, name: str, what: str) -> None:
        self.swapped.setdefault(what, []).append(name)

    def leave(self, name: str, reason: str) -> None:
        self.left.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        lines = [f"{what}: {_names(names)}" for what, names in self.swapped.items()]
        lines += [f"left, {reason}: {_names(names)}" for reason, names in self.left.items()]
        return "\n".join(lines) or "nothing was recognised"


def accelerate(model: Model) -> Model:
    """Puts our operators into a Transformers model, in place, for training and for inference; returns the model.

    Swapped are attention, norms, feed-forward blocks with the sums and norms around them, and the loss of the
    language-modelling head (in training with labels, the logits are computed only if somebody reads them; torch.compile
    computes them). Each block is first seen to give what the model's own gives. Parameters, their names and the
    state_dict stay as they are; `restore` undoes it, `explain` tells what was done. Do it before
    DistributedDataParallel, FSDP or torch.compile wrap the model.
    """
    restore(model)
    report = Report()
    _swap_attention(model, report)
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            _swap_loss(name, module, report)
        else:
            _swap_block(name, module, report)
    model.__dict__["llmengine_report"] = report
    return model


def explain(model: Module) -> str:
    """What `accelerate` swapped in this model, and what it left and why."""
    report = model.__dict__.get("llmengine_report")
    return "this model is as Transformers made it" if report is None else str(report)


def restore(model: Model) -> Model:
    """Undoes `accelerate`, in place."""
    for module in model.modules():
        take_out(module)
    report = model.__dict__.pop("llmengine_report", None)
    if report is not None:
        for name, implementation in report.attention:
            _transformers_model(model, name).set_attn_implementation(implementation)
    return model


def _swap_attention(model: Module, report: Report) -> None:
    attention.register()
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or module.config._attn_implementation == attention.NAME:
            continue
        if module._can_set_attn_implementation():
            report.attention.append((name, module.config._attn_implementation))
        else:
            report.leave(name, f"{type(module).__name__}, its attention is not called through Transformers' interface")
    for name, _ in report.attention:
        _transformers_model(model, name).set_attn_implementation(attention.NAME)
        report.swap(name, "attention")


def _transformers_model(model: Module, name: str) -> PreTrainedModel:
    found = model.get_submodule(name)
    assert isinstance(found, PreTrainedModel), f"{name} was a Transformers model"
    return found


def _swap_loss(name: str, model: PreTrainedModel, report: Report) -> None:
    if isinstance(model.get_output_embeddings(), torch.nn.Linear):
        kind: Any = type(model)
        stand_in = logits.stand_in(kind)
        put_in(model, stand_in)
        report.swap(name, stand_in.what)


def _swap_block(name: str, module: Module, report: Report) -> None:
    reasons = []
    for stand_in in (*norms.stand_ins(module), *feed_forward.stand_ins(module), *layers.stand_ins(module)):
        reason = disproof(module, stand_in)
        if reason is None:
            put_in(module, stand_in)
            return report.swap(name, stand_in.what)
        reasons.append(reason)
    kind = type(module).__name__
    if reasons or EXPECTED.search(kind):
        report.leave(name, f"{kind}, {reasons[-1] if reasons else 'nothing that we have is of its shape'}")


def _names(names: list[str]) -> str:
    """Layers of one name, whatever their numbers, are one entry with their count."""
    counts = collections.Counter(re.sub(r"\d+", "*", name) or "the model" for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
