"""Matrices of 8-bit floats, as backends keep and exchange them.

Numbers are the bytes (torch.uint8, which opcheck can compare) of torch.float8_e4m3fn or torch.float8_e5m2, in matrices
(lines, k) with k rounded up to a multiple of 16 by zeros. They are multiplied by float32 scales: (1, 1), or one for a
block of 1 or 128 lines and 128 of k, as (k / 128, blocks of lines), both rounded up.

Attention's operands are e4m3, each head's in tiles of 128 tokens, counted within a sequence. A tile's numbers, with m
its largest finite magnitude, are x / 2^e, where e is the least integer that keeps m / 2^e up to 448, and at least -126.
Queries and keys are turned first: filled up with zeros to a class of widths, times signs of their columns, times the
Walsh-Hadamard matrix of 1 and -1. A score is then the product over the width. All in float32.
Probabilities are rounded to e4m3 as 2^8 exp(logit - the largest of the row so far), a step of keys after the other;
outputs are divided by the sum of these.
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


# ---- attention -------------------------------------------------------------------------------------------------------

TILE = 128  # tokens that share a scale
LEAST_EXPONENT = -126  # of a scale
LIFT = 2.0**8  # of probabilities: the largest one, of e4m3's numbers up to 448
WIDTHS = (64, 128, 256)  # the classes of kernels


def width_of(head_dim: int) -> int:
    """Up to which queries and keys are filled up: a power of two."""
    return next((width for width in WIDTHS if width >= head_dim), 1 << (head_dim - 1).bit_length())


def keys_of_step(head_dim: int) -> int:
    """So many keys' probabilities are rounded at once (csrc/cuda/attention_fp8.h)."""
    return 128 if width_of(head_dim) <= 128 else 64


def is_negated(column: int) -> bool:
    """Whether a column's sign changes before it is turned: fixed bits without a pattern."""
    return bool(0x9E3779B9 * (2 * (column // 32) + 1) >> column % 32 & 1)
