"""The engine's generator (csrc/ops/philox.h) in tensor arithmetic: equal draws, bit for bit, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, in int64 without overflow."""
    low_product = a * (b & 0xFFFF)
    high_product = a * (b >> 16) + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def keep_multiplier(
    seed: Tensor, p: float, stream: Tensor | int, row: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """Dropout multipliers, 0 or 1 / (1 - p).

    `seed` is int64 (1,); `stream` and `row` broadcast against each other to shape S; the result is S + (columns,).
    """
    return (draws(int(seed), stream, row, columns) >= int(p * 2**32)).to(dtype) / (1.0 - p)


def draws(seed: int, stream: Tensor | int, row: Tensor, columns: int) -> Tensor:
    """Random words, 0 to 2^32 - 1 in int64, of shape S + (columns,) as in `keep_multiplier`."""
    streams = torch.as_tensor(stream, dtype=torch.int64, device=row.device)
    streams, row = torch.broadcast_tensors(streams, row.to(torch.int64))
    quads = torch.arange((columns + 3) // 4, device=row.device)
    c0 = (row >> 32)[..., None].expand(*row.shape, len(quads))
    c1, c2 = streams[..., None].expand_as(c0), (row & _MASK)[..., None].expand_as(c0)
    c3 = quads.expand_as(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(_M0, c0), _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(-2)[..., :columns]
