"""Matrices of 8-bit floats, as backends keep and exchange them.

Numbers are the bytes (torch.uint8, which opcheck can compare) of torch.float8_e4m3fn or torch.float8_e5m2, in matrices
(lines, k) with k rounded up to a multiple of 16 by zeros. They are multiplied by float32 scales: (1, 1), or one for a
block of 1 or 128 lines and 128 of k, as (k / 128, blocks of lines), both rounded up.
"""

from __future__ import annotations

import torch

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALINGS = ("tensor", "block")
ALIGNED, DEPTH = 16, 128  # what k is rounded up to; of k, in a block


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


def lines_of_block(scaling: str, weight: bool) -> int:
    """0: the whole matrix is one."""
    return 0 if scaling == "tensor" else (128 if weight else 1)


def numbers_shape(lines: int, k: int) -> tuple[int, int]:
    return lines, _blocks(k, ALIGNED) * ALIGNED


def scales_shape(lines: int, k: int, block: int) -> tuple[int, int]:
    return (1, 1) if block == 0 else (_blocks(k, DEPTH), _blocks(lines, block))
