"""Cases of the gradients' norm: tensors of many sizes, none with elements, large and small values, infinity and NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine import optim
from llmengine.testing.sample import Operator, Sample

SIZES = ((5, 7), (), (0, 3), (1,), (64, 65), (9001,))


def gradient_norm(*gradients: Tensor) -> Tensor:
    return optim.gradient_norm(gradients)


def plain(*gradients: Tensor) -> Tensor:
    return torch.nn.utils.get_total_norm([g.detach() for g in gradients])


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def sample(name: str, sizes=SIZES, scale=1.0, poison: tuple[float, ...] = ()) -> Sample:
        tensors = [torch.randn(size, generator=g, dtype=torch.float64) * scale for size in sizes]
        for place, value in enumerate(poison):
            tensors[-1][place] = value
        return Sample(name, tuple(tensors), constants=tuple(range(len(tensors))))

    return [
        sample("plain", ((5, 7), (3, 4))),
        sample("many sizes"),
        sample("one of many", ((20_003,),)),
        sample("nothing", ((0,), (2, 0))),
        sample("small", scale=1e-3),
        sample("infinite", poison=(torch.inf,)),
        sample("both infinities", poison=(torch.inf, -torch.inf)),
        sample("not a number", poison=(torch.inf, torch.nan)),
    ]


OPERATORS = [Operator("gradient_norm", gradient_norm, _samples, plain, of_optim=True)]
