"""The simulator of CUDA kernels catches what it is there to catch: kernels with one known mistake (cases.cu), under
every schedule, and csrc/cuda's own files with one line broken.
"""

from __future__ import annotations

import functools
import mmap
import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.testing import assert_law, simulator
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.simulator import SCHEDULES

from .harness import RUNS

ROOT = Path(__file__).resolve().parents[2]
PLACE = r"thread \(\d+, 0, 0\) of block \(\d+, 0, 0\)"
LINE = r"\((?:cases\.cu|tensor_cases\.cuh):\d+\)"

# What every line of a broken kernel's run must say. Where a mistake shows in one of several ways, all are given.
UNWRITTEN = rf"{PLACE} reads shared memory that no thread of the block wrote {LINE}"
RACE = rf"{PLACE} races: (reads|writes) {LINE} what {PLACE} (reads|writes) {LINE} with no barrier between: byte \d+ of"
UNWAITED = rf"what a copy of {PLACE} (reads|writes) {LINE} with no wait_copies between: byte \d+ of"
UNTOLD = rf"what a bulk copy writes {LINE} with no mbarrier_wait between: byte \d+ of shared (slots|tile)"
FEW_BYTES = (
    r"in block \(0, 0, 0\) a phase ends while a bulk copy is under way that reports to its mbarrier, byte \d+ of "
    "shared full: it expects fewer bytes than come"
)
FINDINGS = {
    "reverse_in_shared": rf"({UNWRITTEN}|{RACE} shared tile)",
    "reuse_of_slots": rf"{RACE} shared slots",
    "barrier_of_some": rf"deadlock in block \(0, 0, 0\): threads 0-31 at __syncthreads {LINE}; threads 32-127 exited",
    "barrier_in_branches": rf"divergent barrier in block \(0, 0, 0\): threads 0-63 at __syncthreads {LINE}; "
    rf"threads 64-127 at __syncthreads {LINE}",
    "named_barriers": rf"deadlock in block \(0, 0, 0\): threads 0-63 exited; threads 64-127 at named barrier {LINE}",
    "barriers_in_turn": rf"{PLACE} comes to barrier 1 again while others are yet to come for its last time {LINE}",
    "half_a_warp": rf"deadlock in block \(0, 0, 0\): threads 0, 2, .* at barrier_arrive {LINE}; threads 1, 3, .* at "
    rf"barrier_sync {LINE}",
    "barrier_beyond": rf"{PLACE} uses barrier 16; there are 16 {LINE}",
    "barrier_of_a_hundred": rf"{PLACE} gives barrier 1 100 threads; whole warps are needed {LINE}",
    "barrier_of_two_counts": rf"{PLACE} gives barrier 1 (64|128) threads where others gave (64|128) {LINE}",
    "neighbours_in_a_warp": rf"({UNWRITTEN}|{RACE} shared tile)",
    "shuffle_of_half": rf"{PLACE} __shfl_xor_sync reads lane \d+, which takes no part {LINE}",
    "mask_of_absent_lanes": rf"({PLACE} exits while {PLACE} waits for it at __shfl_xor_sync {LINE}|"
    rf"{PLACE} calls __shfl_xor_sync {LINE} with a mask that names {PLACE}, which has exited)",
    "mask_without_oneself": rf"{PLACE} calls __ballot_sync with mask 0xfffffffe, which leaves out its own lane {LINE}",
    "past_the_end": r"thread \(6, 0, 0\) of block \(2, 0, 0\) reads 4 bytes 0 bytes past the end of in \(1, 70\) "
    rf"{LINE}",
    "past_the_row": rf"thread \(20, 0, 0\) of block \(\d, 0, 0\) writes 4 bytes at byte \d+ of out \(3, 20\), "
    rf"between its rows {LINE}|thread \(20, 0, 0\) of block \(2, 0, 0\) writes 4 bytes 0 bytes past the end of out "
    rf"\(3, 20\) {LINE}",
    "halo": r"thread \(63, 0, 0\) of block \(0, 0, 0\) writes 4 bytes at byte 256 of shared tile, which has 256 "
    rf"{LINE}",
    "dynamic_memory": rf"thread \(63, 0, 0\) of block \(0, 0, 0\) writes 4 bytes at byte 252 of dynamic shared memory, "
    rf"which has 252 {LINE}",
    "among_variables": rf"thread \(0, 0, 0\) of block \(0, 0, 0\) writes 4 bytes at byte 233472 of dynamic shared "
    rf"memory, which has 1024 {LINE}",
    "memory_of_no_block": r"thread \(0, 0, 0\) of block \(0, 0, 0\) writes 4 bytes at byte \d{6,} of dynamic shared "
    rf"memory, which has 1024 {LINE}",
    "overrun_of_whole_pages": r"thread \(0, 0, 0\) of block \(0, 0, 0\) writes 4 bytes at byte 4096 of shared first, "
    rf"which has 4096 {LINE}",
    "unwritten_slot": UNWRITTEN,
    "partly_written_vector": UNWRITTEN,
    "misaligned_vector": rf"{PLACE} reads 16 bytes at an address that is not a multiple of 16 {LINE}",
    "count_threads": rf"{RACE} out",
    "one_element_of_all_blocks": rf"{PLACE} races: writes {LINE} what a thread of another block writes {LINE} "
    r"without an order between blocks: byte 0 of out",
    "forgotten_wait": rf"{PLACE} races: reads {LINE} {UNWAITED} shared tile",
    "forgotten_commit": rf"{PLACE} races: reads {LINE} {UNWAITED} shared tile",
    "wait_without_barrier": rf"({UNWRITTEN}|{PLACE} races: reads {LINE} what a copy of {PLACE} writes {LINE} "
    r"with no (wait_copies|barrier) between: byte \d+ of shared tile)",
    "group_too_many": rf"{PLACE} races: reads {LINE} {UNWAITED} shared stages",
    "stage_overwritten": rf"({PLACE} races: its copy writes {LINE} what {PLACE} reads {LINE} with no barrier between: "
    rf"byte \d+ of shared stages|{PLACE} races: reads {LINE} {UNWAITED} shared stages)",
    "source_overwritten": rf"{PLACE} races: writes {LINE} {UNWAITED} out",
    "fetch_past_the_end": rf"thread \(17, 0, 0\) of block \(0, 0, 0\) reads 16 bytes at byte 272 of in \(1, 70\), "
    rf"across its end {LINE}|{PLACE} reads 16 bytes \d+ bytes past the end of in \(1, 70\) {LINE}",
    "fetch_of_too_many_bytes": rf"{PLACE} copies 16 bytes where 0 to 8 fit {LINE}",
    "misaligned_source": rf"{PLACE} copies 16 bytes from an address that is not a multiple of 16 {LINE}",
    "misaligned_destination": rf"{PLACE} copies 16 bytes to an address that is not a multiple of 16 {LINE}",
    "fetch_to_global_memory": rf"{PLACE} copies to memory that is not shared {LINE}",
    "rows_of_a_warp": rf"{PLACE} races: its warp reads {LINE} what {PLACE} writes {LINE} with no barrier between: "
    r"byte \d+ of shared rows",
    "misaligned_row": rf"{PLACE} reads 16 bytes at an address that is not a multiple of 16 {LINE}",
    "row_past_the_array": r"thread \(28, 0, 0\) of block \(0, 0, 0\) reads 16 bytes at byte 512 of shared tile, which "
    rf"has 512 {LINE}",
    "unwritten_row": rf"thread \(28, 0, 0\) of block \(0, 0, 0\) reads shared memory that no thread of the block wrote "
    rf"{LINE}",
    "stored_rows": rf"{RACE} shared rows",
    "lane_missing_from_a_product": rf"({PLACE} exits while {PLACE} waits for it at mma_16x8x16_bf16 {LINE}|"
    rf"{PLACE} calls mma_16x8x16_bf16 {LINE}, which takes a whole warp, but {PLACE} has exited)",
    "product_in_branches": rf"deadlock in block \(0, 0, 0\): threads 0-15 at mma_16x8x16_bf16 {LINE}; "
    rf"threads 16-31 at mma_16x8x16_bf16 {LINE}",
    "product_of_half_a_warp": rf"{PLACE} calls mma_16x8x8_bf16 {LINE}, which takes a whole warp, in a warp of 16 "
    r"threads",
    "bulk_no_wait": rf"{PLACE} races: reads {LINE} {UNTOLD}",
    "bulk_one_look": rf"({UNWRITTEN}|{PLACE} races: reads {LINE} {UNTOLD})",
    "bulk_parity": rf"({UNWRITTEN}|{PLACE} races: reads {LINE} {UNTOLD})",
    "bulk_expectation": rf"({UNWRITTEN}|{PLACE} races: reads {LINE} {UNTOLD})",
    "bulk_few_bytes": rf"({FEW_BYTES}|{PLACE} races: reads {LINE} {UNTOLD})",
    "bulk_arrivals": rf"deadlock in block \(0, 0, 0\): threads 0-127 at mbarrier_wait {LINE}; the mbarrier at byte 0 "
    r"of shared full lacks 1 arrival and 0 bytes",
    "bulk_fence": rf"{PLACE} calls copy_bulk {LINE} on an mbarrier that {PLACE} initialises {LINE} with no "
    r"mbarrier_init_fence between",
    "bulk_sync": rf"{PLACE} calls mbarrier_try_wait {LINE} on (what no thread has initialised as an mbarrier|an "
    rf"mbarrier that {PLACE} initialises {LINE} with no barrier between: byte 0 of shared full)",
    # the fetching thread may be so far ahead that others miss a phase
    "bulk_slots": rf"({PLACE} races: its copy writes {LINE} what {PLACE} reads {LINE} with no barrier between: byte "
    rf"\d+ of shared slots|{PLACE} races: reads {LINE} {UNTOLD}|deadlock .* at mbarrier_wait {LINE}; the mbarrier .*)",
    "copies_behind_an_mbarrier": rf"{PLACE} races: reads {LINE} {UNWAITED} shared tile",
    "one_copy_expected": rf"({FEW_BYTES}|{PLACE} races: reads {LINE} {UNTOLD})",
    "bulk_copy_of_odd_size": rf"{PLACE} copies 500 bytes in bulk {LINE}; multiples of 16 are needed",
}  # fmt: skip


KERNELS = {"among_variables": "far_past_dynamic_memory", "memory_of_no_block": "far_past_dynamic_memory"}
BULK_MISTAKES = {name for name in FINDINGS if name.startswith("bulk_")} - {"bulk_copy_of_odd_size"}  # of one kernel


@functools.cache
def program() -> Path:
    return simulator.build("simulator_cases") / "simulator_cases"


def findings(case: str, version: str) -> list[str]:
    """What each of the runs printed, without its schedule."""
    done = subprocess.run([program(), case, version], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == RUNS
    return [line.split(": ", 1)[1] for line in lines]


@pytest.mark.parametrize("case", FINDINGS)
def test_a_broken_kernel_is_caught_under_every_schedule(case: str):
    for found in findings(case, "broken"):
        kernel = r"bulk<true, .*?>" if case in BULK_MISTAKES else f"{KERNELS.get(case, case)}<true>"
        assert re.fullmatch(rf"{kernel}: (?:{FINDINGS[case]}).*", found), found


def test_variables_and_dynamic_memory_must_fit_together():
    for found in findings("more_than_there_is", "broken"):
        assert found == (
            "case of float32 (1, 512): invalid configuration argument (grid (1, 1, 1), block (128, 1, 1), 232448 bytes "
            "of dynamic shared memory)"
        )


@pytest.mark.parametrize("case", [*FINDINGS, "more_than_there_is", "copies_left_behind", "row_sums"])
def test_the_same_kernel_without_the_mistake_gives_equal_results_under_every_schedule(case: str):
    results = set(findings(case, "fixed"))
    assert len(results) == 1 and re.fullmatch(r"ok [\d.e+]+", results.pop()), results


# ---- schedules -------------------------------------------------------------------------------------------------------


def values(case: str) -> list[float]:
    return [float(found.removeprefix("ok ")) for found in findings(case, "fixed")]


def test_threads_come_in_the_order_that_the_schedule_has():
    """By the sums of (i + 2) times the ticket of thread i, which one order alone makes the largest, and its reverse
    the smallest; the next ticket is added."""
    upward = 128 + sum((i + 2) * i for i in range(128))
    downward = 128 + sum((i + 2) * (127 - i) for i in range(128))
    first_warp_last = 128 + sum((i + 2) * ((i - 32) % 128) for i in range(128))
    found = values("tickets")
    assert found[:2] == [upward, downward] and found[7] == first_warp_last, "forward, reversed, starved"
    assert len({*found[:2], *found[3:]}) == 7, "each seed: another"
    assert values("tickets") == found, "the same seed: the same"


def test_a_random_order_goes_to_and_fro_between_warps():
    changes = values("changes_of_warps")
    assert changes[:2] == [3, 3] and min(changes[3:7]) > 30


def test_only_a_starved_warp_shows_that_two_rounds_pass_it_by():
    *others, starved = findings("watcher_of_rounds", "broken")
    assert all(found.startswith("ok ") for found in others), "the mistake is one of speed"
    lacks = r"the mbarrier at byte 0 of shared round_over lacks 96 arrivals and 0 bytes"
    stuck = rf"threads 0-30, 32-127 exited; threads 31 at mbarrier_wait {LINE}"
    expected = rf"watcher_of_rounds<true>: deadlock in block \(0, 0, 0\): {stuck}; {lacks}"
    assert re.fullmatch(expected, starved), starved
    assert set(values("watcher_of_rounds")) == {8256}


def test_bulk_copies_take_effect_at_any_lawful_moment():
    """How many of 32 have come at the first look."""
    came = values("one_look_each")
    assert came[:2] == pytest.approx([0, 32]), "forward: as late as possible; reversed: at once"
    assert all(0.5 < count < 31.5 for count in came[3:7]), "random: some"


@pytest.mark.parametrize("case", ["arrivals_at_once", "early_arrivals"])
def test_copies_take_effect_at_any_lawful_moment(case: str):
    """How many of 128 have arrived though none needs to: at the issue, and when the group before was waited for."""
    arrived = values(case)
    assert arrived[:2] == pytest.approx([0, 128]), "forward: as late as possible; reversed: at once"
    assert all(1 < count < 127 for count in arrived[3:7]), "random: some"


# ---- the engine's own kernels ----------------------------------------------------------------------------------------

BREAKS = [
    pytest.param("reduce.cuh", "  __syncthreads();\n", "", id="reduce: no barrier"),
    pytest.param("reduce.cuh", "  turn ^= 1;\n", "", id="reduce: the same slots every time"),
    pytest.param("reduce.cuh", "lane < warps ?", "lane <= warps ?", id="reduce: one slot too many"),
    pytest.param("reduce.cuh", "kWholeWarp, x[i], lanes", "0xffffu, x[i], lanes", id="reduce: half a mask"),
]


@pytest.mark.parametrize("file, line, broken", BREAKS)
def test_a_mistake_in_a_shared_header_is_caught(file: str, line: str, broken: str, tmp_path: Path):
    source = (ROOT / "csrc/cuda" / file).read_text()
    assert source.count(line) >= 1, "the line to break has changed: change this test with it"
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / file).write_text(source.replace(line, broken, 1))
    folder = program().parent
    options = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-Wno-unknown-pragmas", "-x", "c++"]
    includes = [f"-I{path}" for path in (tmp_path, ROOT / "csrc/sim/include", ROOT / "csrc")]
    case_file, obj, mutant = ROOT / "tests/sim/cases.cu", tmp_path / "cases.o", tmp_path / "cases"
    subprocess.run(["c++", *options, *includes, "-c", case_file, "-o", obj], check=True)
    subprocess.run(["c++", obj, folder / "libsimulator.a", "-ldl", "-o", mutant], check=True)
    done = subprocess.run([mutant, "row_sums", "fixed"], capture_output=True, text=True, timeout=120)
    runs = done.stdout.splitlines()
    assert len(runs) == len(RUNS) and not any(": ok" in run for run in runs), done.stdout


# ---- the backend -----------------------------------------------------------------------------------------------------


def add_norm(backend: str, x, residual, weight, bias) -> list[torch.Tensor]:
    """Outputs and gradients of one call with dropout."""
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    torch.manual_seed(3)
    with llmengine.backend(backend):
        y, h = functional.add_layer_norm(*leaves[:2], x.shape[1:], *leaves[2:], dropout_p=0.2)
        gradients = torch.autograd.grad((y * x).sum() + h.square().sum(), leaves)
    return [y.detach(), h.detach(), *gradients]


# A row of one warp, of some, of a block that reads it again in the backward, and in both passes; not whole vectors.
@pytest.mark.parametrize("columns", [24, 515, 1600, 5003, 16400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_width_is_right_and_has_equal_bits_under_every_schedule(native, columns: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(columns)
    given = [
        torch.randn(*shape, generator=g).to(dtype) for shape in [(7, columns), (7, columns), (columns,), (columns,)]
    ]
    oracle = add_norm("reference", *(t.double() for t in given))
    plain = add_norm("reference", *given)
    seen = []
    for order in SCHEDULES:
        native.set_schedule(order, 11)
        seen.append(add_norm("cuda_sim", *given))
    for i, (y, p, o) in enumerate(zip(seen[0], plain, oracle, strict=True)):
        assert_law(y, p, o, OUTPUT if i < 2 else GRADIENT, f"{columns} columns, {dtype}: {i}")
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("columns", [24, 515, 16400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_of_every_width(native, columns: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(columns)
    x, upstream = (torch.randn(5, columns, generator=g).to(dtype) for _ in range(2))
    x[1], x[2, 3:] = -torch.inf, -torch.inf

    def run(backend: str, x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        with llmengine.backend(backend):
            y = functional.softmax(leaf, -1)
            return [y.detach(), *torch.autograd.grad(y, leaf, upstream.to(x.dtype))]

    oracle, plain = run("reference", x.double()), run("reference", x)
    for order in SCHEDULES:
        native.set_schedule(order, 5)
        for i, (y, p, o) in enumerate(zip(run("cuda_sim", x), plain, oracle, strict=True)):
            assert_law(y, p, o, OUTPUT if i == 0 else GRADIENT, f"{columns} columns, {dtype}, {order}: {i}")


def test_arguments_that_no_kernel_may_see_are_errors(native):
    x, statistics = torch.randn(4, 8), torch.empty(4)
    good = {
        "input": x, "residual": None, "weight": None, "bias": None, "seed": None, "eps": 1e-5, "dropout_p": 0.0,
        "subtract_mean": True, "output": torch.empty(4, 8), "new_residual": None, "mean": statistics,
        "rstd": torch.empty(4), "stream": 0,
    }  # fmt: skip
    native.norm_forward(**good)
    for change, message in [
        ({"output": torch.empty(4, 9)}, r"layer_norm: output has shape \(4, 9\); expected \(4, 8\)"),
        ({"input": x.double()}, "layer_norm: input has dtype float64; allowed: float32, bfloat16, float16"),
        ({"weight": torch.ones(8).half()}, "layer_norm: weight has dtype float16; allowed: float32, float32"),
        ({"mean": None}, "layer_norm: mean is required"),
        ({"dropout_p": 0.5}, "layer_norm: seed is required"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.norm_forward(**(good | change))
    with pytest.raises(TypeError, match="norm_forward: argument stream is missing"):
        native.norm_forward(**{k: v for k, v in good.items() if k != "stream"})


def test_what_a_kernel_only_reads_may_be_memory_that_none_may_write(native):
    """As a file's is that is mapped: results go back to where they have changed, and nowhere else."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, that the tensor must not be written
        x = torch.frombuffer(page, dtype=torch.float32).view(4, 256)
    with llmengine.backend("cuda_sim"):
        assert torch.equal(functional.softmax(x, -1), torch.full((4, 256), 1 / 256))


def test_kernels_are_launched_on_the_stream_that_is_given(native):
    x = torch.randn(2, 8)
    for stream in (0x1230, 0):
        native.softmax_forward(input=x, output=torch.empty_like(x), stream=stream)
        assert native.last_stream() == stream


def test_an_unknown_schedule_is_an_error(native):
    with pytest.raises(ValueError, match="'sideways' is not one of forward, reversed, round_robin, random, starved"):
        native.set_schedule("sideways", 0)


def test_it_is_never_chosen_by_itself(native):
    assert llmengine.explain("layer_norm", torch.randn(2, 8), (8,)).startswith("norm_forward: cpu")
    with llmengine.backend("cuda_sim"):
        assert llmengine.explain("layer_norm", torch.randn(2, 8), (8,)) == "norm_forward: cuda_sim"
