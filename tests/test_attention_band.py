"""What every attention kernel asks before it reads a key: csrc/ops/attention_band.h, and the shares of a cache."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import ROOT, compiled

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SIDES = st.one_of(st.just(-1), st.integers(0, 40), st.just(2**30))
LENGTHS = st.integers(0, 40)
TILES = st.integers(1, 24)
FAR = st.one_of(st.integers(1, 50), st.integers(2**30 - 50, 2**30))
BANDS = st.tuples(LENGTHS, LENGTHS, SIDES, SIDES, st.integers(0, 1))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(["tests/csrc/band_test.cpp"], tmp_path_factory.mktemp("band") / "band_test", [])


def said(program: Path, *calls: tuple) -> str:
    lines = "".join(" ".join(map(str, (*call, *[0] * (10 - len(call))))) + "\n" for call in calls)
    return subprocess.run([program], input=lines, capture_output=True, text=True, timeout=60).stdout


@given(band=BANDS, rows=TILES, keys=TILES)
@SETTINGS
def test_spans_hold_what_is_seen_and_no_more(program: Path, band, rows, keys):
    assert said(program, ("spans", *band, rows, keys)) == "passed\n"


@given(band=BANDS, rows=TILES, keys=TILES)
@SETTINGS
def test_kernels_meet_every_pair_once(program: Path, band, rows, keys):
    assert said(program, ("visits", *band, rows, keys)) == "passed\n"


@given(band=st.tuples(FAR, FAR, SIDES, SIDES, st.integers(0, 1)), places=st.lists(st.tuples(FAR, FAR), min_size=1))
@SETTINGS
def test_32_bits_are_enough_for_2_to_the_30_tokens(program: Path, band, places):
    assert said(program, *[("widths", *band, *place) for place in places]) == "passed\n"


@given(
    length=st.integers(0, 700), rows=st.integers(1, 16), left=SIDES, round=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 40),
)  # fmt: skip
@SETTINGS
def test_shares_hold_every_key_once(program: Path, length, rows, left, round, splits):
    assert said(program, ("shares", length, rows, left, round, splits)) == "passed\n"


BREAKS = {
    "a key too many": ("attention_band.h", "row + shift + right + 1", "row + shift + right + 2"),
    "a row too few": ("attention_band.h", "key - shift + left + 1", "key - shift + left"),
    "full spans of the first row": ("attention_band.h", "begin(row_end - 1), end(row)}", "begin(row), end(row)}"),
    "a round for nobody": ("decode_attention.h", "each + (share < more)", "each"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.heavy] * (i > 0)) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_told(name: str, tmp_path: Path):
    header, line, broken = BREAKS[name]
    text = (ROOT / "csrc/ops" / header).read_text()
    assert line in text, "the line to break has changed: change this test with it"
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / header).write_text(text.replace(line, broken, 1))
    program = compiled(["tests/csrc/band_test.cpp"], tmp_path / "band_test", ["-iquote", str(tmp_path)])
    calls = [("spans", 9, 12, 2, 3, 1, 4, 5), ("visits", 9, 12, 2, 3, 0, 4, 5), ("shares", 100, 2, -1, 16, 3)]
    assert "FAILED" in said(program, *calls)
