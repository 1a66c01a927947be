"""Shapes of buffers on which all backends of an operator, and its fake kernel, agree."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_rows_first(like: Tensor, head_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (batch, heads, rows, head_dim), stored as (batch, rows, heads, head_dim)."""
    batch, heads, rows, _ = like.shape
    return like.new_empty((batch, rows, heads, head_dim), dtype=dtype or like.dtype).transpose(1, 2)
