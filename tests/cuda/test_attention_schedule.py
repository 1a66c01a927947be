"""In which order tiles of attention are taken (csrc/cuda/attention_schedule.h), on the host: each once, and so that
blocks end together."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import compiled

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MIB = 2**20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(["tests/csrc/schedule_test.cpp"], tmp_path_factory.mktemp("schedule") / "schedule_test", [])


def said(program: Path, lines: list[str]) -> list[str]:
    done = subprocess.run([program], input="\n".join(lines), check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()


def turns_of(program: Path, tiles: int, owners: int, together: int, last_first: int) -> list[tuple[int, ...]]:
    (line,) = said(program, [f"turns {tiles} {owners} {together} {last_first}"])
    numbers = list(map(int, line.split()))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@given(tiles=st.integers(1, 40), owners=st.integers(1, 60), together=st.integers(1, 60), last_first=st.integers(0, 1))
@SETTINGS
def test_every_tile_is_taken_once(program: Path, tiles: int, owners: int, together: int, last_first: int):
    turns = turns_of(program, tiles, owners, min(together, owners), last_first)
    assert sorted(turns) == [(t, o) for t in range(tiles) for o in range(owners)]


def test_the_longest_tiles_of_a_section_come_first(program: Path):
    turns = turns_of(program, 3, 5, 2, 1)
    assert turns == [(t, o) for owners in ((0,), (1, 2), (3, 4)) for t in (2, 1, 0) for o in owners]


# ---- balance ---------------------------------------------------------------------------------------------------------

# (owner, heads that pass a tile of keys, own lines, lines that pass, bytes of each of those, blocks of a
# multiprocessor): of kernels for sm_80, head dims 64, 128 and 256, and for Hopper, in two passes and in one.
KERNELS = {
    "forward sm_80, 64": ("rows", 128, 64, 256, 2), "forward sm_80, 128": ("rows", 128, 48, 512, 2),
    "forward sm_80, 256": ("rows", 64, 64, 1024, 2), "rows sm_80, 128": ("rows", 64, 32, 512, 2),
    "keys sm_80, 64": ("keys", 128, 16, 256, 2), "keys sm_80, 128": ("keys", 64, 32, 512, 2),
    "forward sm_90a, 128": ("rows", 128, 128, 512, 1), "forward sm_90a, 256": ("rows", 128, 64, 1024, 1),
    "rows sm_90a, 128": ("rows", 128, 80, 512, 1), "keys sm_90a, 128": ("keys", 128, 48, 512, 1),
    "one pass, 128": ("keys", 128, 64, 1024, 1),
}  # fmt: skip
DEVICES = [(46, 4 * MIB), (82, 6 * MIB), (108, 40 * MIB), (132, 50 * MIB)]  # multiprocessors and their cache
BANDS = {"causal": (-1, 0), "full": (-1, -1), "window": (512, 0), "long window": (4096, 0), "both sides": (256, 256)}


def balance(
    program: Path, kernel: str, band: str, device: tuple[int, int], calls: list[tuple[int, int, list[int]]],
    word: str = "call",
):  # fmt: skip
    """Of calls of (heads, group, lengths) that give every block two tiles or more: what they are, when blocks end, no
    sooner than when they could, and the longest tile."""
    owner, own, passing, line_bytes, at_once = KERNELS[kernel]
    blocks, lines, told = at_once * device[0], [], []
    for heads, group, lengths in calls:
        owners = heads // group if owner == "keys" else heads
        tiles = sum(-(-length // own) for length in lengths) * owners
        if not 2 * blocks <= tiles <= 40000:
            continue
        given = (owner == "keys", owners, group, own, passing, *BANDS[band], line_bytes, device[1], blocks)
        lines.append(f"{word} {' '.join(str(int(x)) for x in given)} {len(lengths)} {' '.join(map(str, lengths))}")
        told.append(f"{kernel}, {band}, {device[0]} multiprocessors, {heads} heads by {group}: {lengths[:3]}")
    for what, line in zip(told, said(program, lines), strict=True):
        once, end, least, longest = map(float, line.split())
        assert once, f"{what}: a tile is taken twice, or not at all"
        yield what, end, least, longest


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d[0]}-multiprocessors")
@pytest.mark.parametrize("band", BANDS)
def test_blocks_end_within_5_percent_of_the_best_order(program: Path, band: str, device: tuple[int, int]):
    """16384 tokens and 65536, 512 to 65536 long: within 5 % of what no order is better than. Where windows cut tiles
    short, three quarters of a tile are more, if a block has less than 15 of them: then within those."""
    calls = [
        (heads, group, [length] * (tokens // length))
        for heads, group in ((12, 1), (16, 1), (32, 4), (64, 8))
        for length, tokens in itertools.product([2**n for n in range(9, 17)], (16384, 65536))
        if length <= tokens
    ]
    count = 0
    for kernel in KERNELS:
        for what, end, least, longest in balance(program, kernel, band, device, calls):
            allowed = max(1.05 * least, least + 0.75 * longest if BANDS[band][0] >= 0 else 0.0)
            assert end <= allowed, f"{what}: {end / least - 1:.1%} later, {(end - least) / longest:.2f} of a tile"
            count += 1
    assert count > 100


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d[0]}-multiprocessors")
@pytest.mark.parametrize("band", BANDS)
@given(lengths=st.lists(st.integers(0, 5).flatmap(lambda n: st.integers(16 << n, 128 << n)), min_size=8, max_size=60))
@settings(SETTINGS, max_examples=5)
def test_blocks_end_a_tile_apart_where_sequences_are_packed(program: Path, band: str, device, lengths: list[int]):
    """On sm_80, of all lengths in any order, which the host does not know: a longest tile later than the best order at
    most. Hopper's: test_attention_packed.py."""
    calls = [(heads, group, each) for heads, group in ((16, 1), (32, 4)) for each in (lengths, [*lengths, 9000, 3, 0])]
    for kernel in (name for name in KERNELS if "sm_80" in name):
        for what, end, least, longest in balance(program, kernel, band, device, calls, "packed"):
            assert end <= max(1.05 * least, least + longest), f"{what}: {(end - least) / longest:.2f} of a tile"
