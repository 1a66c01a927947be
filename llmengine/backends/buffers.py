"""Shapes of buffers on which all backends of an operator, and its fake kernel, agree; stand-ins for strided ones."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_rows_first(like: Tensor, head_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (batch, heads, rows, head_dim), stored as (batch, rows, heads, head_dim)."""
    batch, heads, rows, _ = like.shape
    return like.new_empty((batch, rows, heads, head_dim), dtype=dtype or like.dtype).transpose(1, 2)


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
