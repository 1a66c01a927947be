"""Tiles of the matrix products: one explicit table per architecture, no search at run time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llmengine.backends.triton import tuned
from llmengine.backends.triton.device import architecture, is_amd, multiprocessors
from llmengine.backends.triton.rows import power_of_2

# tl.dot wants at least this many of each.
SMALLEST = 16
# Rows of tiles that run side by side, so that their columns' operand is read from the L2 cache.
GROUP = 8


class Tile(NamedTuple):
    """m x n of the result, by k of the products at a time; `stages` k-steps are on their way to shared memory."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def programs(self, rows: int, columns: int) -> int:
        return -(-rows // self.m) * -(-columns // self.n)

    def constants(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": GROUP, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


# Widest first; the first that gives every multiprocessor a program is taken, or the last.
#   plain: a product alone.
#   fused: an epilogue with an activation or a second operand, which needs registers beside the accumulators.
#   pair: two accumulators (a gate) and such an epilogue, or an epilogue that holds several operands.
#   ragged: strides that are no multiple of 16, so that each element of an operand is loaded by itself.
# Each was compiled for its architectures without spilling (aot.py); none has been timed: `llmengine tune` does.
Table = dict[str, tuple[Tile, ...]]
_FLOAT32: Table = {
    "plain": (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 8, 2)),
    "fused": (Tile(64, 64, 16, 8, 2),),
    "pair": (Tile(64, 32, 16, 8, 2),),
    "ragged": (Tile(64, 32, 16, 8, 2),),
}
_AMPERE: Table = {
    "plain": (Tile(128, 256, 32, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 4)),
    "fused": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 8, 4)),
    "pair": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 8, 4)),
    "ragged": (Tile(64, 64, 32, 8, 3),),
}
_HOPPER: Table = {
    "plain": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    "fused": (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    "pair": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    "ragged": (Tile(64, 64, 32, 8, 3),),
}
# An epilogue reads its accumulators from tensor memory all at once.
_BLACKWELL: Table = _HOPPER | {
    "plain": (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    "fused": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
}
_CDNA3: Table = {
    "plain": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
    "fused": (Tile(128, 64, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
    "pair": (Tile(64, 64, 64, 8, 2),),
    "ragged": (Tile(64, 64, 32, 8, 2),),
}
# Few programs, and every loop and edge of a matrix of a hundred rows: what the interpreter takes is programs.
_INTERPRETER: Table = dict.fromkeys(("plain", "fused", "pair", "ragged"), (Tile(64, 128, 64, 4, 1),))
# For 16-bit floats; NVIDIA before sm_90 and consumer GPUs (sm_120) have the shared memory of Ampere, AMD's of CDNA3.
TABLE = {"sm_90": _HOPPER, "sm_100": _BLACKWELL, "sm_103": _BLACKWELL, "gfx942": _CDNA3, "gfx950": _CDNA3}


def pick(kind: str, a: torch.Tensor, b: torch.Tensor) -> Tile:
    """The tile of the product a b (b.T in memory or not: what counts is strides)."""
    tile = tuned.tile(*slot_of(kind, a, b), a.device)
    m, n, k = (max(power_of_2(size), SMALLEST) for size in (a.shape[0], b.shape[1], a.shape[1]))
    m, n, k = min(tile.m, m), min(tile.n, n), min(tile.k, k)
    return tile._replace(m=m, n=n, k=k, warps=tile.warps if m * n >= 2048 else 4)


def slot_of(kind: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, Tile]:
    """The place in the tables that serves the product, by name, and the tile there."""
    rows, columns = a.shape[0], b.shape[1]
    if any(stride != 1 and stride % 16 for stride in (*a.stride(), *b.stride())):
        kind = "ragged"
    enough = multiprocessors(a.device)
    tiles = table(architecture(a.device), a.dtype)[kind]
    index = next((i for i, t in enumerate(tiles) if t.programs(rows, columns) >= enough), len(tiles) - 1)
    return slot(kind, a.dtype, index), tiles[index]


def table(place: str, dtype: torch.dtype) -> Table:
    """Of an architecture and operands."""
    if place == "interpreter":
        return _INTERPRETER
    if dtype == torch.float32:
        return _FLOAT32
    return TABLE.get(place, _CDNA3 if is_amd(place) else _AMPERE)


def slot(kind: str, dtype: torch.dtype, index: int) -> str:
    """The name of a place in the table."""
    return f"products {kind} {'float32' if dtype == torch.float32 else '16-bit'} {index}"
