"""A case: a call of an operator and of its peers on equal tensors, and what the machine must do for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.roofline.shapes import Shape

BOTH = "forward + backward"


@dataclass(frozen=True)
class Case:
    """A call of an operator and its peers' on equal tensors; `run[name](*tensors)` gives the (first) output.

    Attributes:
        bytes_moved, flops: what the forward cannot do without: each tensor read or written once; a multiply-add is two
            operations, and those of elementwise parts are not counted.
        backward_bytes, backward_flops: the same of the backward, beyond the forward.
        passes: what is timed: all but `BOTH` is a call without gradients.
    """

    operator: str
    name: str
    dtype: torch.dtype
    run: dict[str, Callable[..., Tensor]]
    tensors: list[Tensor]
    bytes_moved: float
    flops: float = 0.0
    backward_bytes: float = 0.0
    backward_flops: float = 0.0
    passes: tuple[str, ...] = ("forward", BOTH)

    def work(self, which: str) -> tuple[float, float]:
        """(bytes moved, operations) of a pass."""
        if which != BOTH:
            return self.bytes_moved, self.flops
        return self.bytes_moved + self.backward_bytes, self.flops + self.backward_flops


class Tensors:
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def classes(self, n: int, count: int) -> Tensor:
        return torch.randint(n, (count,), device=self.device)

    def bytes(self, *tensors: Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)


def named(shape: Shape, *rest: str) -> str:
    return " ".join(["x".join(map(str, shape)), *rest])
