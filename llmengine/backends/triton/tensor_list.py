"""Many tensors in one launch.

A table of their addresses, sizes and first blocks goes to the device. A program owns BLOCK elements of one of them,
which it finds by comparing its number with all first blocks: a few KiB from the L2 cache.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a program: 16 bytes of a 16-bit dtype for each of 256 threads
TABLES = 64  # that are kept

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Entry = tuple[int, ...]  # of a tensor, or of several of one size: the size, and what else kernels want of it


@triton.jit
def find(table, count, program, COUNT: tl.constexpr):
    """The program's column of the table, by its first row's address. COUNT: a power of 2, at least `count`."""
    places = tl.arange(0, COUNT)
    firsts = tl.load(table + places, places < count, 1 << 62)
    return table + tl.sum((firsts <= program).to(tl.int32)) - 1


@triton.jit
def tensor_at(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def blocks(entry: Entry) -> int:
    return -(-entry[0] // BLOCK)


def is_aligned(size: int, *addresses: int) -> bool:
    """Whether the tensors begin and end between 16 bytes: then no element is read singly."""
    return size % 16 == 0 and all(address % 16 == 0 for address in addresses)


def table_of(entries: tuple[Entry, ...], device: torch.device) -> Tensor:
    """int64 (1 + numbers of an entry, entries) on the device: the first block of each, and its numbers.

    It is kept as long as addresses stay, so that a steady training loop copies nothing.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        # the copy is part of the graph: each replay reads the host's table again, and no one else has the device's
        host = _page_locked.place(rows_of(entries))
        return host.to(device, non_blocking=True)
    return _kept_table(entries, device)[1]


def rows_of(entries: tuple[Entry, ...]) -> Tensor:
    firsts = itertools.accumulate(map(blocks, entries[:-1]), initial=0)
    return torch.tensor([[first, *entry] for first, entry in zip(firsts, entries, strict=True)]).T.contiguous()


class PageLocked:
    """Host memory for what graphs read at each replay, which therefore is never given back.

    It is reserved before any capture, by the first call outside of one: page-locking waits for the device and queries
    events, which a capture may not.
    """

    def __init__(self, numbers: int, pin: Callable[[Tensor], Tensor] = Tensor.pin_memory):
        self.numbers, self.pin = numbers, pin
        self.room = torch.empty(0, dtype=torch.int64)
        self.used: list[Tensor] = []

    def reserve(self) -> None:
        if self.room.numel() < self.numbers // 2:
            self.room = self.pin(torch.empty(self.numbers, dtype=torch.int64))

    def place(self, table: Tensor) -> Tensor:
        """The table's copy there, or in memory of its own where there is no more room."""
        if table.numel() > self.room.numel():
            self.used.append(self.pin(table))
            return self.used[-1]
        host, self.room = self.room[: table.numel()].view(table.shape), self.room[table.numel() :]
        self.used.append(host.copy_(table))
        return host


def _new_table(entries: tuple[Entry, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    host = rows_of(entries)
    if device.type == "cuda":
        _page_locked.reserve()
        host = host.pin_memory()
    return host, host.to(device, non_blocking=True)


_kept_table = functools.lru_cache(maxsize=TABLES)(_new_table)
_page_locked = PageLocked(1 << 17)  # 1 MiB: steps of a hundred graphs of a model with 150 tensors
