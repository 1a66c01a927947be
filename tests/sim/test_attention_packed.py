"""Packed sequences of skewed lengths in the simulator. On Hopper's kernels: the order of tiles that
csrc/cuda/attention_sm90a_order.cu makes, that blocks draw those tiles and no others, that results are right, and lines
broken; what the order is good for is told on the host: tests/cuda/test_attention_packed.py. On every GPU's: places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine.backends import cuda_sim
from llmengine.backends.cuda.native import ATTENTION, ATTENTION_BACKWARD, Native
from llmengine.testing import Sample, poison
from llmengine.testing.samples import attention

from .harness import loaded, schedule
from .test_attention import HALVES, HEAVY, VARLEN, assert_right
from .test_attention_sm90a import broken

OWN = 128  # lines of a tile, of all kernels here
SKEWED = {
    "one long, many short": [260, *[3] * 9],
    "the long one last": [*[3] * 9, 260],
    "empty ones": [0, 0, 130, 0, 7, 0, 0, 140, 0],
    "one": [140],
    "nothing": [0, 0],
    "no sequence": [],
}


@pytest.fixture(autouse=True)
def asked_for(request, monkeypatch):
    schedule(request)
    monkeypatch.setenv(ATTENTION, "sm90a")


@pytest.fixture
def rooms(monkeypatch) -> list[dict[str, Any]]:
    """What kernels were given, with their turns as they left them behind."""
    calls: list[dict[str, Any]] = []
    call = Native.call

    def noted(self, kernel, on, **arguments):
        call(self, kernel, on, **arguments)
        turns = arguments.get("turns")
        calls.append(arguments | {"kernel": kernel, "turns": None if turns is None else turns.clone()})

    monkeypatch.setattr(Native, "call", noted)
    return calls


def skewed(name: str, rows: list[int], keys: list[int] | None = None, dim: int = 24, **options) -> Sample:
    m = attention._Maker(len(rows))
    m.packed(name, rows, keys or rows, 2, 1, dim, spare=2, **options)
    return m.samples[0]


def assert_in_order(room: Tensor, lengths: list[int], heads: int) -> None:
    """A kernel's list has every tile of a head, sections lie side by side, and all its turns were drawn."""
    drawn, count, together, _ = room[:4].tolist()
    tiles = [tuple(tile) for tile in room[4 : 4 + 4 * count].view(-1, 4).tolist()]
    expected = [(tile, s) for s, length in enumerate(lengths) for tile in range(-(-length // OWN))]
    assert sorted((tile, s) for tile, s, *_ in tiles) == sorted(expected), "a tile is not in the list once"
    for i, (_, _, begin, end) in enumerate(tiles):
        assert begin <= i < end <= count and tiles[begin][2:] == (begin, end), "a section is not what it says"
    assert 1 <= together <= heads
    assert drawn == count * heads, "turns that are not tiles were drawn"  # one after each tile


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("passes", ["two_pass", "one_pass"])
def test_blocks_draw_the_tiles_that_there_are(name: str, passes: str, rooms, monkeypatch):
    lengths = SKEWED[name]
    monkeypatch.setenv(ATTENTION_BACKWARD, passes)
    number = list(SKEWED).index(name)
    options = ({"is_causal": True}, {}, {"window_size": (100, 30)}, {"causal": "bottom_right"}, {}, {})[number]
    assert_right(VARLEN, skewed(name, lengths, **options), HALVES[number % 2])
    forward, backward = rooms
    assert_in_order(forward["turns"][0], lengths, 2)
    assert_in_order(backward["turns"][1], lengths, 1)
    if passes == "two_pass":
        assert_in_order(backward["turns"][0], lengths, 2)
    places = sum(lengths) // OWN + len(lengths)
    assert passes == "two_pass" or backward["remade"].numel() == 1 + 2 * places


def test_keys_and_rows_have_orders_of_their_own(rooms):
    rows, keys = [140, 0, 3, 130, 9], [5, 130, 0, 20, 140]
    assert_right(VARLEN, skewed("cross", rows, keys), HALVES[0])
    assert_in_order(rooms[0]["turns"][0], rows, 2)
    assert_in_order(rooms[1]["turns"][1], keys, 1)


def test_the_longest_tiles_come_first(rooms):
    lengths = [130, 300, 20]
    assert_right(VARLEN, skewed("causal", lengths, is_causal=True), HALVES[1])
    for which, last_first in ((0, True), (1, False)):
        room = rooms[1]["turns"][which]
        order = [tuple(tile) for tile in room[4 : 4 + 4 * int(room[1])].view(-1, 4)[:, :2].tolist()]
        assert order[0] == ((2, 1) if last_first else (0, 1)) and (0, 2) in order[-3:]


def test_a_tile_that_is_made_anew_is_found_in_its_sequence(rooms, monkeypatch):
    """A key that is opposed to all queries of the last sequence, and 10^4 times as long as others."""
    monkeypatch.setenv(ATTENTION_BACKWARD, "one_pass")
    sample = skewed("outlier", [40, 3, 0, 140])
    query, key = sample.args[:2]
    query[43:, :, 0] = query[43:, :, 0].abs() + 1.0
    key[50] = 0.0
    key[50, :, 0] = -3e4
    assert_right(VARLEN, sample, torch.bfloat16)
    flags = rooms[1]["remade"]
    places = flags[1:].view(-1, 2)  # by heads; the last sequence's first is 43 / 128 + 3
    assert int(flags[0]) == 4 and places[3:].sum() == 4 and not places[:3].any()


# ---- on every GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SKEWED)
def test_every_gpus_blocks_go_through_places(name: str, rooms, monkeypatch):
    """Of rows, of keys, and of what is yet to be added up of a bias by distance, which has a table for each place."""
    monkeypatch.setenv(ATTENTION, "sm80")
    lengths, number = SKEWED[name], list(SKEWED).index(name)
    options = ({"is_causal": True}, {}, {"window_size": (100, 30)}, {"causal": "bottom_right"}, {}, {})[number]
    assert_right(VARLEN, skewed(name, lengths, list(reversed(lengths)), **options), HALVES[number % 2])
    m = attention._Maker(number)
    m.packed("bias", lengths, lengths, 2, 1, 24, spare=70, distance_bias=m.table(2, 9), **options)
    assert_right(VARLEN, m.samples[0], HALVES[number % 2 - 1])
    partial = rooms[-1]["partial_distances"]
    assert rooms[-1]["kernel"] == "attention_backward"
    assert partial.shape == ((sum(lengths) + 70) // 64 + len(lengths) + 1, 2, 19)


# ---- one line broken -------------------------------------------------------------------------------------------------

ORDER = "attention_sm90a_order"
RACE = "with no barrier|races|no thread"
# line, what it becomes, what must be said: a wrong order, or what the simulator found
BREAKS = {
    "counts not cleared before they are raised": (
        "    if (thread == 0) room.work = 0, room.longest = 0;\n    __syncthreads();\n",
        "    if (thread == 0) room.work = 0, room.longest = 0;\n", RACE,
    ),
    "counts not waited for": ("    __syncthreads();\n    if (warp_of() == 0)", "    if (warp_of() == 0)", RACE),
    "begins not waited for": ("to_begins(room);\n    __syncthreads();\n", "to_begins(room);\n", RACE),
    "the end not known to all": ("    __syncthreads();  // all know the end\n", "", RACE),
    "a class in one place": (
        "begin + atomicAdd(room.counts + class_of_work(item.work), 1)", "begin + room.counts[class_of_work(item.work)]",
        "in the list once|races|with no",
    ),
    "sections over each other": ("p.sections, section + 1)", "p.sections, section) + 1", "in the list once|differs"),
    "all sections from the first place": ("    begin = end;\n", "", "in the list once|says|drawn|differs"),
    "a lane's classes are one": (
        "room.counts + lane_of() * kEach", "room.counts + lane_of()", "in the list once|races|with no",
    ),
    "the sequence before": ("lines, true) <= place ? low", "lines, true) < place ? low", "in the list once|differs"),
    "empty places have tiles": (
        "first < 0 || first >= (keys ? at.s.keys : at.s.rows)", "first < 0", "in the list once|writes|outside",
    ),
}  # fmt: skip
# Sections of some places each, where one would do.
SECTIONS = ("sections = fewer > 1 ? fewer : 1;", "sections = 3;")


def try_order(rooms) -> None:
    lengths = [260, 3, 0, 0, 140, *[3] * 9]
    sample = skewed("broken", lengths, is_causal=True).rounded(torch.float16)
    results = []
    for backend, given in (("cuda_sim", sample), ("reference", sample.rounded(torch.float64))):
        with llmengine.backend(backend), poison():
            results.append(VARLEN.function(*given.args, **given.kwargs).double())
    assert torch.allclose(*results, atol=4e-3), "differs"
    assert_in_order(rooms[0]["turns"][0], lengths, 2)


def test_whole_kernels_pass_what_broken_ones_must_fail(rooms, tmp_path: Path, monkeypatch):
    try_order(rooms)
    rooms.clear()
    module = broken(ORDER, ("", ""), SECTIONS, tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    try_order(rooms)
    room = rooms[0]["turns"][0]
    assert len(set(room[4 : 4 + 4 * int(room[1])].view(-1, 4)[:, 2].tolist())) == 3


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 5 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, rooms, tmp_path: Path, monkeypatch):
    line, becomes, said = BREAKS[name]
    module = broken(ORDER, (line, becomes), SECTIONS, tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_order(rooms)
