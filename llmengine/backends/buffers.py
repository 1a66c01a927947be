"""Shapes of buffers on which all backends of an operator, and its fake kernel, agree; stand-ins for strided ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def empty_rows_first(like: Tensor, head_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (batch, heads, rows, head_dim), stored as (batch, rows, heads, head_dim)."""
    batch, heads, rows, _ = like.shape
    if dtype is None:  # said to new_empty, it would take a microsecond more
        return like.new_empty(batch, rows, heads, head_dim).transpose(1, 2)
    return like.new_empty((batch, rows, heads, head_dim), dtype=dtype).transpose(1, 2)


Mains = Mapping[int, Tensor | None]
"""Of the gradients, by number, those of weights: the float32 buffer that each is added to, or None."""


def empty_gradients(
    like: Tensor, gradients: Sequence[tuple[Sequence[int], torch.dtype]], wanted: Sequence[bool], mains: Mains
) -> tuple[Tensor, ...]:
    """Of that (shape, dtype) each, where it is wanted and no buffer takes it; otherwise of no element."""
    return tuple(
        like.new_empty(shape if want and mains.get(i) is None else (0,), dtype=dtype)
        for i, ((shape, dtype), want) in enumerate(zip(gradients, wanted, strict=True))
    )


def destinations(gradients: Sequence[Tensor], wanted: Sequence[bool], mains: Mains) -> list[Tensor | None]:
    """Where a kernel puts each gradient: there, or into its buffer; None where it is not wanted."""
    found = [gradient if mains.get(i) is None else mains[i] for i, gradient in enumerate(gradients)]
    return [place if want else None for place, want in zip(found, wanted, strict=True)]


def added(gradient: Tensor, main: Tensor | None) -> Tensor:
    """The gradient or, once it has been added to its buffer, nothing."""
    if main is None:
        return gradient
    main.add_(gradient)
    return gradient.new_empty(0)


class Packed:
    """Contiguous stand-ins for tensors that a kernel changes: where one was needed, it is copied back at the end."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t if t.is_contiguous() else self._copy(t) for t in tensors]

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.contiguous()
        self._copies.append((tensor, copy))
        return copy

    def __enter__(self) -> Packed:
        return self

    def __exit__(self, error, *_) -> None:
        for tensor, copy in self._copies if error is None else ():
            tensor.copy_(copy)
