"""Tiles of packed sequences (csrc/cuda/attention_packed.h) on the host: their places, each taken once and nothing else,
and so that blocks end together however skewed lengths are."""

from __future__ import annotations

import itertools
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import compiled

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MIB = 2**20
# (whether keys own tiles, own lines, lines that pass, bytes of each of those): Hopper's
KERNELS = {
    "forward, 64": (False, 128, 128, 256), "forward, 128": (False, 128, 128, 512),
    "forward, 256": (False, 128, 64, 1024), "fp8, 128": (False, 128, 128, 256), "rows, 128": (False, 128, 80, 512),
    "keys, 128": (True, 128, 48, 512), "wide keys, 256": (True, 64, 64, 1024), "one pass, 128": (True, 128, 64, 1024),
}  # fmt: skip
BANDS = {"causal": (-1, 0), "full": (-1, -1), "window": (512, 0), "long window": (4096, 0), "both sides": (256, 256)}


class Told(NamedTuple):
    once: bool
    turns: int
    places: int
    sections: int
    together: int
    end: float
    least: float
    longest: float


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = ["tests/csrc/packed_test.cpp"]
    return compiled(sources, tmp_path_factory.mktemp("packed") / "packed_test", [])


def said(program: Path, lines: list[str]) -> list[str]:
    done = subprocess.run([program], input="\n".join(lines), check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()


def line_of(kernel: str, band: str, heads: int, group: int, rows: list[int], keys: list[int], blocks: int = 132) -> str:
    keys_own, own, passing, line_bytes = KERNELS[kernel]
    owners = heads // group if keys_own else heads
    numbers = (keys_own, owners, group, own, passing, *BANDS[band], line_bytes, 50 * MIB, blocks, len(rows))
    return f"call {' '.join(str(int(x)) for x in (*numbers, *rows, *keys))}"


def calls(program: Path, lines: list[str]) -> list[Told]:
    answers = [map(float, line.split()) for line in said(program, lines)]
    return [
        Told(bool(once), *map(int, counts), *times)
        for once, *rest in answers
        for counts, times in [(rest[:4], rest[4:])]
    ]


# ---- places ----------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 700)), min_size=1, max_size=40),
    lines=st.sampled_from([64, 128]), spare=st.integers(0, 90),
)  # fmt: skip
@SETTINGS
def test_places_of_sequences_lie_apart_and_fit(program: Path, lengths: list[int], lines: int, spare: int):
    begins = list(itertools.accumulate(lengths, initial=0))
    asked = [f"first {i} {begins[i]} {length} {lines} 1" for i, length in enumerate(lengths)]
    end = 0
    for first, length in zip(map(int, said(program, asked)), lengths, strict=True):
        assert end <= first <= end + 1
        end = first + -(-length // lines)
    assert end <= (begins[-1] + spare) // lines + len(lengths)


def test_a_batch_has_its_places_side_by_side(program: Path):
    assert said(program, [f"first {i} 0 130 64 0" for i in range(3)]) == ["0", "3", "6"]


# ---- order -----------------------------------------------------------------------------------------------------------


def test_classes_of_work_are_an_eighth_apart(program: Path):
    works = sorted({1, 2, 3, *(int(2 ** (n / 16)) + d for n in range(500) for d in (-1, 0, 1) if 2 ** (n / 16) > 2)})
    classes = [int(x) for x in said(program, [f"class {w}" for w in works])]
    assert classes == sorted(classes, reverse=True) and max(classes) <= 255 and min(classes) >= 0
    for (work, of), (more, of_more) in itertools.pairwise(zip(works, classes, strict=True)):
        assert of == of_more or more > work
    least: dict[int, int] = {}
    for work, of in zip(works, classes, strict=True):
        assert work <= least.setdefault(of, work) * 9 / 8, f"{work} is in the class of {least[of]}"


lengths_of_all_kinds = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(1, 30), st.integers(1, 1200)), st.one_of(st.none(), st.integers(0, 900))
    ),
    min_size=1,
    max_size=40,
)


@given(
    kernel=st.sampled_from(sorted(KERNELS)), band=st.sampled_from(sorted(BANDS)), lengths=lengths_of_all_kinds,
    heads=st.sampled_from([(1, 1), (6, 1), (8, 4), (12, 3)]), blocks=st.integers(1, 140),
)  # fmt: skip
@SETTINGS
def test_every_tile_has_a_turn_and_nothing_else(program: Path, kernel, band, lengths, heads, blocks: int):
    """Of sequences of all lengths, some of them empty, some with other keys than rows."""
    rows = [length for length, _ in lengths]
    keys = [length if other is None else other for length, other in lengths]
    (told,) = calls(program, [line_of(kernel, band, *heads, rows, keys, blocks)])
    keys_own, own, *_ = KERNELS[kernel]
    owners = heads[0] // heads[1] if keys_own else heads[0]
    assert told.once and told.turns == sum(-(-length // own) for length in (keys if keys_own else rows)) * owners


def chosen(seed: int, count: int, low: int, high: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randint(low, high) for _ in range(count)]


SKEWED = {
    "one long and 1000 short": [16384] + [20] * 1000,
    "the long one last": [20] * 1000 + [16384],
    "two long between short ones": [20] * 500 + [8192, 8192] + [30] * 500,
    "empty ones": [0, 9000, 0, 0, 3000, 0] * 3 + [0],
    "each half of the one before": [32768 >> n for n in range(14)],
    "like one over n": [20000 // n for n in range(1, 300)],
    "sentences": chosen(3, 128, 16, 512),
    "documents": chosen(2, 60, 100, 20000),
    "four kinds": [random.Random(1).choice((64, 300, 1000, 4000)) for _ in range(60)],
    "alike": [4096] * 8,
    "alike and long": [65536] * 4,
    "one": [32768],
    "a tile and two lines": [130] * 400,
}


@pytest.mark.parametrize("lengths", SKEWED.values(), ids=SKEWED)
def test_blocks_end_within_5_percent_of_the_best_order(program: Path, lengths: list[int]):
    """However skewed lengths are: but for windows, which cut tiles short, where a block has less than fifteen tiles."""
    for (name, kernel), band, (heads, group) in itertools.product(
        KERNELS.items(), BANDS, ((16, 1), (32, 4), (64, 8), (12, 1))
    ):
        blocks = 132
        owners = heads // group if kernel[0] else heads
        tiles = sum(-(-length // kernel[1]) for length in lengths) * owners
        if tiles < 2 * blocks:
            continue
        (told,) = calls(program, [line_of(name, band, heads, group, lengths, lengths, blocks)])
        assert told.once and told.turns == tiles
        few = BANDS[band][0] >= 0 and tiles < 15 * blocks
        allowed = max(1.05 * told.least, told.least + 0.75 * told.longest if few else 0.0)
        late = (told.end - told.least) / told.longest
        assert told.end <= allowed, f"{name}, {band}, {heads}: {told.end / told.least - 1:.1%}, {late:.2f} of a tile"


def test_sections_are_what_the_cache_holds(program: Path):
    """Of a million tokens of one head, keys and values take 512 MB: some 31 MB of 50 at a time, of few heads."""
    (told,) = calls(program, [line_of("forward, 128", "causal", 16, 1, [8192] * 128, [8192] * 128)])
    assert told.sections >= 512 * MIB / (0.625 * 50 * MIB) and told.together <= 2
    (told,) = calls(program, [line_of("forward, 128", "causal", 32, 4, [1024] * 16, [1024] * 16)])
    assert told.sections == 1 and 4 <= told.together < 32  # 8 MB a head of keys
