"""Tuned tiles: the file, the search on a model of what calls cost, and both on kernels that the interpreter runs."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from triton.runtime.errors import OutOfResources

import llmengine
from llmengine import functional
from llmengine.backends.triton import attention_table, device, norm, rows, tiles, tuned, tuning, tuning_problems
from llmengine.backends.triton.tuning import Problem
from llmengine.cli.tune import OPERATORS, tune
from tests.cli.conftest import call

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not device.INTERPRETED, reason="needs Triton's interpreter")
SLOT = "attention forward plain 64"
FIELDS = {"rows": 64, "keys": 32, "warps": 4, "stages": 3}
FIELDS |= {"built_in": [128, 128, 8, 2], "ms": 1.0, "built_in_ms": 2.0}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where tuned tiles are looked for within the test; nothing is there."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.forget()
    yield path
    tuned.forget()


# ---- the file --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    rows: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 2


def test_what_is_written_is_used(file):
    tuned.write(file, CPU, {SLOT: FIELDS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.tile(SLOT, Tile(), CPU) == Tile(64, 32, 4, 3)
        assert tuned.tile("attention forward plain 128", Tile(), CPU) == Tile()
        assert tuned.tile(SLOT, Tile(), torch.device("meta")) == Tile()  # ahead of time: the built-in tables


BROKEN = {
    "JSON": (lambda r: "{", "is not JSON"),
    "an object": (lambda r: "[]", "holds a list"),
    "format": (lambda r: r | {"format": 0}, "made for format 0; here it is 2"),
    "another GPU": (lambda r: r | {"device": "X"}, "made for device 'X'; here it is"),
    "another Triton": (lambda r: r | {"triton": "1.0"}, "made for triton '1.0'"),
    "no tiles": (lambda r: r | {"tiles": None}, "has no object 'tiles'"),
    "a table": (lambda r: r | {"tiles": {"convolution 3": FIELDS}}, "'convolution 3' is in no table; tables are att"),
    "a field less": (lambda r: r | {"tiles": {SLOT: {"rows": 64}}}, "must have the fields rows, keys, warps, stages"),
    "no power of 2": (lambda r: r | {"tiles": {SLOT: FIELDS | {"rows": 48}}}, r"has rows 48; allowed: \(16, 32,"),
    "a boolean": (lambda r: r | {"tiles": {SLOT: FIELDS | {"warps": True}}}, r"has warps True; allowed: \(1, 2,"),
    "no list": (lambda r: r | {"tiles": {SLOT: FIELDS | {"built_in": 1}}}, "has built_in 1; it must be a list"),
    "too many": (lambda r: r | {"tiles": {SLOT: FIELDS | {"stages": 99}}}, r"has stages 99; allowed: \(1, 2,"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_named_and_left_alone(case, file):
    change, said = BROKEN[case]
    broken = change(tuned.origin(CPU) | {"tiles": {SLOT: FIELDS}})
    file.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.warns(tuned.TunedTableWarning, match=f"tuned.json.*{said}.*the built-in tiles are used"):
        assert tuned.tile(SLOT, Tile(), CPU) == Tile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert tuned.tile(SLOT, Tile(), CPU) == Tile()


def test_a_tile_measured_beside_another_is_left_alone(file):
    """Of the same version: a table that has changed since."""
    tuned.write(file, CPU, {SLOT: FIELDS})
    with pytest.warns(tuned.TunedTableWarning, match=f"'{SLOT}' was measured beside another built-in tile"):
        assert tuned.tile(SLOT, Tile(stages=3), CPU) == Tile(stages=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert tuned.tile(SLOT, Tile(stages=3), CPU) == Tile(stages=3)
        assert tuned.tile(SLOT, Tile(), CPU) == Tile(64, 32, 4, 3)


def test_a_missing_file_is_told_where_it_was_asked_for(file, tmp_path, monkeypatch):
    with pytest.warns(tuned.TunedTableWarning, match="tuned.json"):
        assert tuned.tile(SLOT, Tile(), CPU) == Tile()
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.tile(SLOT, Tile(), CPU) == Tile()


def test_a_file_a_model_of_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert tuned.path_for(CPU) == tmp_path / "llmengine" / "tuned-nvidia-h100-80gb-hbm3.json"
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.path_for(CPU) is None


# ---- the search ------------------------------------------------------------------------------------------------------


BEST = Tile(32, 256, 4, 4)


def cost(tile) -> float:
    """A millisecond for each step, of any field, from the best tile."""
    steps = (abs(math.log2(a / b)) for a, b in zip(tile[:3], BEST[:3], strict=True))
    return 1.0 + sum(steps) + abs(tile.stages - BEST.stages)


def modelled(calls, cost=cost):
    return {tile: cost(tile) for tile in calls}


def problem(run=lambda tile: [torch.ones(3)]) -> Problem:
    """One whose result depends on the tile that its slot holds."""
    return Problem(SLOT, Tile(), lambda: [lambda: run(tuned.tile(SLOT, Tile(), torch.device("meta")))])


def test_the_search_ends_at_the_fastest_tile():
    found = tuning.search(problem(), modelled)
    assert found.tile == BEST and (found.built_in_ms, found.ms) == (cost(Tile()), 1.0)
    beside = {"built_in": list(Tile()), "ms": 1.0, "built_in_ms": cost(Tile())}
    assert found.record() == found.tile._asdict() | beside


def test_what_is_hardly_faster_is_not_taken():
    found = tuning.search(problem(), functools.partial(modelled, cost=lambda t: 1.0 if t == Tile() else 0.99))
    assert found.tile == found.built_in and not found.improved


def test_what_is_not_faster_again_is_not_taken():
    """The last measurement decides: noise that favoured a tile once is not written down."""
    times = iter([{Tile(): 1.0, Tile(64): 0.5}, {}, {}])

    def measure(calls):
        return dict.fromkeys(calls, 1.0) | {tile: ms for tile, ms in next(times).items() if tile in calls}

    assert not tuning.search(problem(), measure).improved


def raising(error: Exception, wrong=lambda tile: tile.rows < 128):
    def run(tile):
        if wrong(tile):
            raise error
        return [torch.ones(3)]

    return run


OTHER = "other results than with the built-in tile"
FAULTS = {
    "does not fit": (raising(OutOfResources(300, 200, "shared memory")), "out of resource: shared memory, Required"),
    "is not compiled": (raising(RuntimeError("\nPassManager::run failed\nat 3")), "PassManager::run failed"),
    "is too much": (raising(torch.OutOfMemoryError("CUDA out of memory. Tried")), "CUDA out of memory. Tried"),
    "is wrong": (lambda tile: [torch.ones(3) * (1.1 if tile.rows < 128 else 1)], OTHER),
    "is infinite": (lambda tile: [torch.ones(3) / (tile.rows >= 128)], OTHER),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_tile_that_fails_is_no_candidate(case):
    """However fast it is, and so nothing beyond it is reached; why not is told."""
    run, reason = FAULTS[case]
    told: list[str] = []
    assert tuning.search(problem(run), modelled, tell=told.append).tile == Tile(128, 256, 4, 4)
    assert told[0].startswith(f"{SLOT}: not rows 64, keys 128, warps 8, stages 2: {reason}")


def test_a_tile_that_breaks_the_device_ends_the_search():
    with pytest.raises(torch.AcceleratorError):
        tuning.search(problem(raising(torch.AcceleratorError("illegal memory access"))), modelled)


@pytest.mark.parametrize("fails", ["run", "make"])
def test_a_built_in_tile_that_fails_costs_its_slot_alone(fails, file, capsys):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 3 GiB")

    other = "attention forward plain 128"
    bad = Problem(other, Tile(), (lambda: [run_out]) if fails == "run" else run_out)
    tuned.write(file, CPU, {other: FIELDS})
    tune(iter([bad, problem()]), file, CPU, modelled, lambda: False)
    said = capsys.readouterr().out
    assert f"{other}: skipped, for its built-in tile fails: CUDA out of memory. Tried to allocate\n" in said
    assert "1 of 1 tiles are faster than built in" in said
    tiles = tuned.read(file, CPU)
    assert tiles[other] == FIELDS and tiles[SLOT]["ms"] == 1.0
    with pytest.raises(torch.AcceleratorError):
        broken = problem(raising(torch.AcceleratorError("lost"), lambda tile: True))
        tune(iter([broken, problem()]), file, CPU, modelled, lambda: False)


def test_problems_are_as_large_as_there_is_room_for(monkeypatch):
    for gigabytes, tokens, most in ((80, 4096, 2**28), (8, 4096, 2**27), (6, 2048, 3 * 2**25), (0.1, 256, 1677721)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=gigabytes: (int(free * 2**30), 0))
        place = tuning_problems.Place.on(CPU)
        assert (place.tokens, place.most) == (tokens, most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_are_compared_row_by_row(dtype: torch.dtype):
    """Of causal attention over 4096 random values, whose last rows are means, and so small beside the first."""
    values = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    exact = values.cumsum(0) / torch.arange(1, 4097)[:, None]
    expected = exact.to(dtype)
    rounded = (exact * (1 + 2**-20)).to(dtype)
    assert tuning.same(rounded, expected) and tuning.same(rounded[None, :, :1], expected[None, :, :1])
    for broken in (slice(-64, None), slice(2000, 2001), (slice(-64, None), slice(32, None))):
        zeroed = expected.clone()
        zeroed[broken] = 0
        assert not tuning.same(zeroed, expected)
    nothing, noise = torch.zeros(4096, 64, dtype=dtype), expected.clone()
    nothing[:2048] = noise[:2048] = 1
    noise[2048:] *= 2**-20
    assert tuning.same(noise, nothing), "what is 0 but for rounding"
    one = torch.tensor(3.0, dtype=dtype)
    assert tuning.same(one * (1 + 2**-9), one) == (dtype != torch.float32) and not tuning.same(one * 1.1, one)
    assert tuning.same(expected[:0], expected[:0]) and tuning.same(expected[:, :0], expected[:, :0])


def test_the_search_stops_in_time():
    left = iter([False, True])
    found = tuning.search(problem(), modelled, lambda: next(left))
    assert found.ms == cost(Tile()) - 1  # one step


def test_what_is_known_is_lost_to_a_faster_tile_alone():
    """However short the time: here none is left once the built-in tile has run."""

    def found(known, cost=cost, left=()):
        left = iter(left)
        measure = functools.partial(modelled, cost=cost)
        return tuning.search(problem(), measure, lambda: next(left, True), known).tile

    earlier = Tile(64, 256, 4, 3)
    assert cost(earlier) < cost(Tile())
    assert found(None) == Tile()
    assert found(earlier) == earlier
    assert found(earlier, left=[False]) in tuning.neighbours(earlier), "a step on from there"
    assert found(earlier, left=[False] * 9) == BEST
    assert found(earlier, cost=lambda tile: 2.0 if tile == earlier else 1.0) == Tile(), "as it is measured now"
    assert found(earlier, cost=lambda tile: 1.0 if tile == earlier else 0.99, left=[False] * 9) == Tile()
    assert found(earlier, cost=lambda tile: 0.99 if tile == earlier else 1.0) == earlier, "faster still, if by little"
    wrong = problem(lambda tile: [torch.ones(3) * (1 if tile.stages == 2 else 2)])
    assert tuning.search(wrong, modelled, lambda: True, earlier).tile == Tile()


# ---- kernels ---------------------------------------------------------------------------------------------------------

TINY = tuning_problems.Place(CPU, torch.float16, batch=1, heads=1, tokens=40)
SHAPES = [(300, 32, 528), (40, 32, 48)]
WIDTHS = [64, 272]


@pytest.fixture
def narrow_rows(monkeypatch):
    """Rows of 272 are wide: their backward sweeps them."""
    monkeypatch.setattr(norm, "BACKWARD_WIDEST", 128)


def all_problems():
    yield from tuning_problems.attention(TINY)
    yield from tuning_problems.products(TINY, SHAPES)
    yield from tuning_problems.row_kernels(TINY, WIDTHS)
    yield from tuning_problems.relative(TINY)


@interpreted
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("gfx942", marks=pytest.mark.heavy)])
def test_every_slot_is_read_by_the_calls_that_stand_for_it(architecture, monkeypatch, narrow_rows):
    """And they run: nothing but the slot's tile is asked for where a call says that it is that slot's."""
    asked: list[str] = []
    lookup = tuned.tile
    monkeypatch.setattr(tuned, "tile", lambda slot, *rest: asked.append(slot) or lookup(slot, *rest))
    slots = []
    with device.assume(architecture):
        for p in all_problems():
            for one in p.calls:
                asked.clear()
                assert all(t.isfinite().all() for t in one())
                assert p.slot in asked, p.slot
            slots.append(p.slot)
        tables = attention_table.table(architecture)
    places = ((o, kernel, width) for o, kernels in tables.items() for kernel in kernels for width in kernels[kernel])
    assert len(slots) == len(set(slots)) and {attention_table.slot(*place) for place in places} <= set(slots)
    assert {s.split()[1] for s in slots if s.startswith("products")} == {"plain", "fused", "pair", "ragged"}
    assert {" ".join(s.split()[1:-2]) for s in slots if s.startswith("rows")} == set(tuning_problems.ROW_KERNELS)
    assert {s.split()[1] for s in slots if s.startswith("relative")} == {"forward", "rows", "keys", "distances"}
    assert set(tuning_problems.PROBLEMS) == set(OPERATORS) == {s.split()[0] for s in slots} == set(tuned.FIELDS)


@interpreted
def test_from_the_search_to_the_kernels(file, capsys):
    best = {
        "attention forward plain 64": attention_table.Tile(64, 32, 4, 3),
        "products plain float32 1": tiles.Tile(32, 64, 16, 4, 2),
        "relative forward 16-bit 64": attention_table.Tile(32, 64, 8, 1),
        "rows softmax forward 16-bit 64": rows.Tile(4, 1),
    }

    problems: list[Problem] = []

    def measure(calls):
        aim = best[problems[-1].slot]
        return {t: 1.0 + sum(abs(math.log2(a / b)) for a, b in zip(t, aim, strict=True)) for t in calls}

    def of_best():
        for p in all_problems():
            if p.slot in best:
                problems.append(p)
                yield p
            if len(problems) == len(best):
                return

    with device.assume("sm_80"):
        tune(of_best(), file, CPU, measure, lambda: False)
        said = capsys.readouterr().out
        assert "4 of 4 tiles are faster than built in" in said and "(rows 64, keys 32, warps 4, stages 3)" in said
        assert json.loads(file.read_text())["tiles"].keys() == best.keys()
        query = torch.randn(1, 2, 70, 64, dtype=torch.float16)
        assert attention_table.tile_for(query, "forward", 64, plain=True) == best["attention forward plain 64"]
        constants = rows.row_tiles("softmax forward", query, 40, 64)[1]
        assert (constants["ROWS"], constants["num_warps"]) == best["rows softmax forward 16-bit 64"]
        assert rows.row_tiles("softmax forward", query, 2, 64)[1]["ROWS"] == 2  # no more than there are
        with llmengine.backend("triton"):
            ours = functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    with llmengine.backend("reference"):
        torch.testing.assert_close(
            ours, functional.scaled_dot_product_attention(query, query, query, is_causal=True), rtol=1e-2, atol=1e-3
        )


@interpreted
def test_a_later_run_keeps_what_it_does_not_measure(file):
    tuned.write(file, CPU, {"attention keys busy 256": FIELDS})
    slow = problem()
    tune(iter([slow]), file, CPU, modelled, lambda: False)
    assert tuned.read(file, CPU).keys() == {"attention keys busy 256", SLOT}
    best = tuned.read(file, CPU)[SLOT]
    left = iter([False])  # it is over when the slot has begun
    tune(iter([slow]), file, CPU, modelled, lambda: next(left, True))
    assert tuned.read(file, CPU)[SLOT] == best
    tune(iter([slow]), file, CPU, functools.partial(modelled, cost=lambda tile: 1.0), lambda: False)
    assert tuned.read(file, CPU).keys() == {"attention keys busy 256"}
    tune(iter([slow]), file, CPU, modelled, lambda: True)  # no time
    assert tuned.read(file, CPU).keys() == {"attention keys busy 256"}


@pytest.mark.skipif(torch.cuda.is_available() and not device.INTERPRETED, reason="there is a GPU")
def test_the_program_says_what_it_needs():
    done = call("tune")
    assert done.exit_code == 2
    assert "error: tune needs a GPU that Triton compiles for (NVIDIA from Ampere on, AMD CDNA3): " in done.output
    script = "import sys; sys.modules['triton'] = None; from llmengine.cli import main; sys.argv[1:] = ['tune']; main()"
    without = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert without.returncode == 2 and "AMD CDNA3): Triton cannot be imported (" in without.stderr, without.stderr
    done = call("tune", "--operator", "softmax")
    assert done.exit_code == 2 and "--operator softmax: allowed are attention, products" in done.output
