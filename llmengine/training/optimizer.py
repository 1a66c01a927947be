"""AdamW with decay on matrices only, learning-rate schedules, gradient clipping, optimizer state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from llmengine.optim import AdamW, gradient_norm
from llmengine.training.layer_rates import shares
from llmengine.training.sections import OptimizerSection, ScheduleSection


def adamw(model: Module, config: OptimizerSection, layer_decay: float = 1.0) -> AdamW:
    """AdamW over all parameters that are trained: matrices decay; embeddings, biases and norms do not.

    layer_decay: see `layer_rates`. A group's "share" is what its learning rate is of that of the step.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    share_of = shares(model, layer_decay)
    groups: dict[tuple[float, float], list[Tensor]] = {(1.0, config.weight_decay): [], (1.0, 0.0): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # XLNet's biases of the scores have two dimensions
        matrix = parameter.dim() > 1 and not name.endswith("bias") and id(parameter) not in embeddings
        groups.setdefault((share_of(parameter), config.weight_decay if matrix else 0.0), []).append(parameter)
    described = [
        {"params": parameters, "share": share, "weight_decay": decay}
        for (share, decay), parameters in groups.items()
        if parameters
    ]
    return AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(peak: float, schedule: ScheduleSection, step: int, steps: int) -> float:
    """Of the 0-based step, a function of nothing else: up linearly to `peak`, then down to final * peak at the last."""
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    way = (step - schedule.warmup) / max(steps - 1 - schedule.warmup, 1)
    left = 0.5 * (1 + math.cos(math.pi * way)) if schedule.kind == "cosine" else 1 - way
    return peak * (schedule.final + (1 - schedule.final) * left)


def clipping(gradients: list[Tensor], limit: float | None) -> tuple[Tensor, Tensor | None]:
    """The gradients' common norm, (), and what the step must scale them by so that it is at most `limit` (None: 1)."""
    norm = gradient_norm(gradients)
    if limit is not None and norm > limit:  # a NaN compares false: the caller sees it in the norm
        return norm, limit / norm
    return norm, None


def state_tensors(optimizer: torch.optim.Optimizer, model: Module) -> dict[str, Tensor]:
    """{"exp_avg.layers.0.…": tensor, "step.layers.0.…": ()} for every parameter that has been updated."""
    state = optimizer.state
    return {f"{key}.{name}": value for name, p in model.named_parameters() for key, value in state.get(p, {}).items()}


def load_state_tensors(optimizer: torch.optim.Optimizer, model: Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_tensors`, onto each parameter's device."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device)
