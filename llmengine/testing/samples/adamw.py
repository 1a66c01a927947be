"""Cases of AdamW: lists of parameters of many sizes, later and first steps, every option, weights with masters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from llmengine.ops import adamw as node
from llmengine.testing.sample import Operator, Sample

SIZES = ((5, 7), (), (0, 3), (1,), (64, 65), (4097,))
OPTIONS = {
    "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False,
    "masters": False, "multiplier": 1.0, "steps": 3,
}  # fmt: skip


def adamw(*tensors: Tensor, **options) -> list[Tensor]:
    """The tensors of all parameters after one step: each parameter's own, its gradient's, m, v, peak and master.

    Nothing that is given is changed. The operator runs on tensors of the strides that are given.
    """
    given = [_copy(t) for t in tensors]
    parameters, gradients, m, v, peaks, masters = (given[i::6] for i in range(6))
    steps = [t.new_full((), options["steps"], dtype=torch.float32) for t in parameters]
    lr, scale = (torch.tensor(options[key], dtype=torch.float64) for key in ("lr", "multiplier"))
    multiplier = None if options["multiplier"] == 1 else scale.to(parameters[0].device, torch.float32)
    node.adamw(
        parameters, gradients, m, v, peaks if options["amsgrad"] else [], masters if options["masters"] else [], steps,
        list(range(len(parameters))), lr, multiplier, None, options["beta1"], options["beta2"], options["eps"],
        options["weight_decay"], options["maximize"], False, 0,
    )  # fmt: skip
    return [*parameters, *m, *v, *peaks, *masters]


def plain(*tensors: Tensor, **options) -> list[Tensor]:
    """PyTorch's fused step; with masters, on the masters, and the parameters are their roundings."""
    parameters, gradients, m, v, peaks, masters = ([t.clone() for t in tensors[i::6]] for i in range(6))
    weights = masters if options["masters"] else parameters
    gradients, moments, squares, largest = (
        [t.to(w.dtype) for t, w in zip(part, weights, strict=True)] for part in (gradients, m, v, peaks)
    )
    torch_adamw(
        weights, [g * options["multiplier"] for g in gradients], moments, squares,
        largest if options["amsgrad"] else [], [t.new_full((), options["steps"], dtype=torch.float32) for t in weights],
        fused=True, amsgrad=options["amsgrad"], beta1=options["beta1"], beta2=options["beta2"], lr=options["lr"],
        weight_decay=options["weight_decay"], eps=options["eps"], maximize=options["maximize"],
    )  # fmt: skip
    results = [*weights, *moments, *squares, *largest]
    return [t.to(m[0].dtype) for t in results] + masters


def _copy(t: Tensor) -> Tensor:
    """A copy that lies in memory as `t` does."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def sample(name: str, sizes=SIZES, scale=1.0, **options) -> Sample:
        tensors = []
        for size in sizes:
            w, gradient, m, v, peak = (torch.randn(size, generator=g, dtype=torch.float64) * scale for _ in range(5))
            tensors += [w, gradient, m, v.square(), peak.square(), w.clone()]
        masters = range(5, len(tensors), 6)
        return Sample(name, tuple(tensors), OPTIONS | options, tuple(range(len(tensors))), tuple(masters))

    return [
        sample("plain", ((5, 7), (3, 4))),
        sample("many sizes"),
        sample("first step", steps=0),
        sample("amsgrad", amsgrad=True),
        sample("maximize", maximize=True),
        sample("scaled gradients", multiplier=0.3125),
        sample("no decay, no momentum", weight_decay=0.0, beta1=0.0, beta2=0.0),
        sample("small values", scale=1e-6, eps=1e-3),
        sample("masters", masters=True),
        sample("masters, amsgrad", masters=True, amsgrad=True, multiplier=2.0),
    ]


OPERATORS = [Operator("adamw", adamw, _samples, plain, of_optim=True)]
