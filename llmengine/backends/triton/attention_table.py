"""Tile sizes of the attention kernels: one explicit table, nothing is searched at run time.

Chosen by ahead-of-time compilation (aot.py): the largest tiles that spill no register and fit the shared memory, with
two programs to a multiprocessor where that costs little. No GPU has timed them yet: `llmengine tune` does (tuned.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmengine.backends.triton import tuned
from llmengine.backends.triton.device import architecture, is_amd


class Tile(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int


FORWARD, KEYS, ROWS, MASK, STATISTICS, DISTANCE = "forward", "keys", "rows", "mask", "statistics", "distance"

# For each kernel, by the widest head dim that a tile serves: columns of padding cost registers too, and what tells them
# from others a few more. "plain": 16-bit operands, logits that are multiples of the products, no dropout. "busy": what
# else stands between products and probabilities takes registers; so do rows that are not aligned. "float32": exact
# products, on NVIDIA's GPUs by the ordinary units, from registers; on CDNA by matrix instructions, where four warps of
# a program may have twice the registers of eight.
_AMPERE = {
    "plain": {
        FORWARD: {64: Tile(128, 64, 8, 3), 112: Tile(64, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        KEYS: {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 192: Tile(16, 32, 8, 2), 256: Tile(16, 64, 8, 2)},
        ROWS: {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 192: Tile(32, 32, 8, 1), 256: Tile(64, 32, 8, 1)},
    },
    "busy": {
        FORWARD: {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
        KEYS: {128: Tile(16, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
        ROWS: {64: Tile(32, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
        MASK: {64: Tile(64, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    },
    "float32": {
        FORWARD: {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
        KEYS: {64: Tile(16, 32, 8, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        ROWS: {64: Tile(32, 32, 8, 2), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        MASK: {256: Tile(16, 16, 8, 1)},
    },
}
_HOPPER = {
    "plain": {
        FORWARD: {
            64: Tile(128, 128, 8, 2), 112: Tile(128, 64, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2),
        },
        KEYS: {64: Tile(64, 128, 8, 2), 112: Tile(32, 64, 8, 3), 128: Tile(32, 128, 8, 3), 256: Tile(32, 32, 8, 2)},
        ROWS: {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    },
    "busy": {
        FORWARD: {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
        KEYS: {64: Tile(32, 64, 8, 2), 128: Tile(16, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
        ROWS: {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
        MASK: {64: Tile(64, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    },
    "float32": {
        FORWARD: {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        KEYS: {64: Tile(16, 32, 8, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        ROWS: {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        MASK: {128: Tile(16, 16, 8, 1), 256: Tile(16, 32, 8, 1)},
    },
}  # fmt: skip
# Its compiler keeps fewer of float32's tiles in registers, of those that a bias by distance crosses, and the largest.
_BLACKWELL = _HOPPER | {
    "plain": _HOPPER["plain"]
    | {
        FORWARD: _HOPPER["plain"][FORWARD] | {128: Tile(128, 64, 8, 3)},
        KEYS: _HOPPER["plain"][KEYS] | {128: Tile(64, 128, 8, 2)},
    },
    "busy": _HOPPER["busy"]
    | {
        FORWARD: {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
        ROWS: {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 8, 1)},
    },
    "float32": _HOPPER["float32"]
    | {
        FORWARD: {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        KEYS: {256: Tile(16, 16, 8, 2)},
        ROWS: {64: Tile(64, 16, 8, 1), 128: Tile(32, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
    },
}
_CDNA = {
    "plain": {
        FORWARD: {64: Tile(128, 64, 4, 1), 128: Tile(128, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
        KEYS: {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 1)},
        ROWS: {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
    "busy": {
        FORWARD: {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 32, 4, 1)},
        KEYS: {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
        ROWS: {64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
        MASK: {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 4, 1)},
    },
    "float32": {
        FORWARD: {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 8, 1)},
        KEYS: {64: Tile(16, 32, 8, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 4, 1)},
        ROWS: {64: Tile(64, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 4, 1)},
        MASK: {256: Tile(16, 32, 4, 1)},
    },
}
# Other GPUs of NVIDIA, consumers' among them, have 99 KiB of shared memory for a program, which the tiles of Ampere
# respect; all of AMD's have the 64 KiB of CDNA.
_TABLES = {"sm_90": _HOPPER, "sm_100": _BLACKWELL, "sm_103": _BLACKWELL, "gfx942": _CDNA, "gfx950": _CDNA}
# Square tiles of every edge in samples of a hundred rows: what the interpreter takes time for is programs.
_INTERPRETER = Tile(64, 64, 1, 1)


def tile_for(x: torch.Tensor, kernel: str, head_dim: int, plain: bool) -> Tile:
    """For operands like `x`; head_dim: the larger of both."""
    place = architecture(x.device)
    if place == "interpreter":
        return _INTERPRETER
    if kernel == STATISTICS:  # rows alone: a small tile, for the product whose diagonal is wanted
        return Tile(16, 16, 2, 1)
    if kernel == DISTANCE:  # square, for its diagonals
        if x.dtype == torch.float32:
            return Tile(16, 16, 4, 1)
        return Tile(32, 32, 8, 1) if head_dim <= 128 else Tile(16, 16, 8, 1)
    operands = "float32" if x.dtype == torch.float32 else "plain" if plain else "busy"
    tiles = table(place)[operands][kernel]
    served = min(widest for widest in tiles if widest >= head_dim)
    return tuned.tile(slot(operands, kernel, served), tiles[served], x.device)


def table(place: str) -> dict[str, dict[str, dict[int, Tile]]]:
    """Of an architecture: operands, kernel, widest head dim: tile."""
    return _TABLES.get(place, _CDNA if is_amd(place) else _AMPERE)


def slot(operands: str, kernel: str, widest: int) -> str:
    """The name of a place in the table."""
    return f"attention {kernel} {operands} {widest}"
