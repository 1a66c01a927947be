"""In which order tiles of attention are drawn (csrc/cuda/attention_schedule.h), on the host: each once, and evenly."""

from __future__ import annotations

import heapq
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "cuda/attention_schedule.h"

int main(int, char** given) {
  using namespace llmengine::cuda::attention;
  const Schedule s{atoi(given[1]), atoi(given[2]), atoi(given[3]), atoi(given[4]) != 0};
  for (int turn = 0; turn < s.count(); ++turn) printf("%d %d\\n", s.at(turn).tile, s.at(turn).owner);
  printf("%d\\n", owners_together(10 << 20, 4, s.owners));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("schedule") / "schedule.cpp"
    source.write_text(PROGRAM)
    built = source.with_suffix("")
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *options, source, "-o", built], check=True)
    return built


def turns_of(program: Path, *numbers: int) -> tuple[list[tuple[int, int]], int]:
    """(tile, owner) of each turn; and of how many owners a cache holds the keys."""
    done = subprocess.run([program, *map(str, numbers)], check=True, capture_output=True, text=True)
    *turns, together = done.stdout.splitlines()
    tiles = [tuple(map(int, turn.split())) for turn in turns]
    return [(tile, owner) for tile, owner in tiles], int(together)


def longest_work(work: list[int], blocks: int) -> int:
    """Of blocks that each draw the next tile when they are done with their last."""
    ends = [0] * blocks
    for tile in work:
        heapq.heapreplace(ends, ends[0] + tile)
    return max(ends)


# tiles of an owner, owners, owners of a section
SIZES = [(1, 1, 1), (5, 7, 3), (16, 32, 32), (64, 16, 4), (64, 17, 4), (128, 16, 12), (3, 1000, 512)]


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_tile_is_drawn_once_and_work_lies_even(program: Path, sizes: tuple[int, int, int], causal: int):
    tiles, owners, _ = sizes
    turns, _ = turns_of(program, *sizes, causal)
    assert sorted(turns) == [(t, o) for t in range(tiles) for o in range(owners)]
    work = [tile + 1 if causal else 1 for tile, _ in turns]
    for blocks in (1, 3, 132):
        least = max(max(work), -(-sum(work) // blocks), -(-len(work) // blocks))
        assert longest_work(work, blocks) <= 1.05 * least + 1


def test_the_longest_tiles_of_a_section_come_first(program: Path):
    turns, together = turns_of(program, 3, 5, 2, 1)
    assert turns == [(t, o) for owners in ((0,), (1, 2), (3, 4)) for t in (2, 1, 0) for o in owners]
    assert together == 5  # all: 32 MiB / 10 MiB times 4 heads that share keys are more
