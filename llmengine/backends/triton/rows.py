"""How the row kernels cut a matrix into tiles: one rule for norms, softmax, losses and embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from llmengine.backends.triton import tuned

# The widest row that one program keeps in registers: 16 warps x 32 lanes x 32 elements.
WIDEST = 16384
# Elements of a program's tile where rows are narrow: below it, launching a program costs more than its work.
SMALLEST = 2048
# Columns of the narrowest tile: dropout draws for four columns at a time (philox.py).
NARROWEST = 4


class Tile(NamedTuple):
    """Rows of a program, and its warps: what `llmengine tune` may change. Columns follow from the matrix."""

    height: int
    warps: int


def row_tiles(
    kernel: str, x: Tensor, rows: int, columns: int, widest: int | None = None
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, constants) of a kernel over x whose program owns ROWS rows of `columns` in tiles of BLOCK columns.

    ONE: a tile covers the row.
    """
    slot, built_in, block = slot_of(kernel, x, columns, widest)
    tile = tuned.tile(slot, built_in, x.device)
    height = min(tile.height, power_of_2(rows))
    warps = tile.warps if height == tile.height else _warps(height * block)
    return (-(-rows // height),), {"ROWS": height, "BLOCK": block, "ONE": block >= columns, "num_warps": warps}


def slot_of(kernel: str, x: Tensor, columns: int, widest: int | None = None) -> tuple[str, Tile, int]:
    """The place that serves the kernel, by name, the tile there, and its columns: at most `widest` (WIDEST), half as
    many where rows are not aligned: their loads are single, with an address each."""
    widest = (widest or WIDEST) // (1 if columns % 16 == 0 else 2)
    block = min(max(power_of_2(columns), NARROWEST), widest)
    height = max(SMALLEST // block, 1)
    operands = "16-bit" if x.element_size() == 2 else "float32"
    return f"rows {kernel} {operands} {block}", Tile(height, _warps(height * block)), block


def _warps(elements: int) -> int:
    """16 to 32 elements for each lane."""
    return min(max(elements // 512, 1), 16)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
