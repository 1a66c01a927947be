"""How the row kernels cut a matrix into tiles: one table for norms, softmax and losses."""

from __future__ import annotations

from typing import Any

# The widest row that one program keeps in registers: 16 warps x 32 lanes x 32 elements.
WIDEST = 16384
# Elements of a program's tile where rows are narrow: below it, launching a program costs more than its work.
SMALLEST = 2048


def row_tiles(rows: int, columns: int, widest: int = WIDEST) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, constants) of a kernel whose program owns ROWS rows of `columns` in tiles of BLOCK columns.

    ONE: a tile covers the row. num_warps gives each lane 16 to 32 elements.
    """
    block = min(power_of_2(columns), widest)
    per_program = min(max(SMALLEST // block, 1), power_of_2(rows))
    warps = min(max(per_program * block // 512, 1), 16)
    tile = {"ROWS": per_program, "BLOCK": block, "ONE": block >= columns, "num_warps": warps}
    return (-(-rows // per_program),), tile


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
