"""The simulator catches mistakes with what sm_90 brought: kernels with one known mistake (hopper_cases.cu), under every
schedule.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmengine.testing import simulator

from .harness import RUNS

BLOCK = r"block \(\d, 0, 0\)"
PLACE = rf"thread \(\d+, 0, 0\) of {BLOCK}"
LINE = r"\((?:hopper_cases\.cu|product_cases\.cuh):\d+\)"
WHERE = r"byte \d+ of (?:dynamic shared memory|shared \w+)(?: of the cluster's block \d)?"

# What every line of a broken kernel's run must say. Where a mistake shows in one of several ways, all are given.
UNWRITTEN = rf"{PLACE} reads shared memory that no thread of the block wrote {LINE}"
UNTOLD = rf"{PLACE} races: reads {LINE} what a bulk copy writes {LINE} with no mbarrier_wait between: {WHERE}"
TOO_EARLY = rf"{PLACE} races: its copy writes {LINE} what {PLACE} reads {LINE} with no barrier between: {WHERE}"
FEW_BYTES = (
    rf"in {BLOCK} a phase ends while a bulk copy is under way that reports to its mbarrier, {WHERE}: it expects fewer "
    "bytes than come"
)
LACKING = rf"deadlock in {BLOCK}: .*at mbarrier_wait {LINE}; the mbarrier at {WHERE} lacks"
RACE = rf"{PLACE} races: reads {LINE} what {PLACE} writes {LINE} with no barrier between: {WHERE}"
PRODUCT = rf"a product of {PLACE}'s warpgroup reads {LINE} with no wgmma_wait between: {WHERE}"
MESSAGE = rf"({RACE}|{BLOCK} ends while {PLACE} uses its shared memory {LINE} with no cluster_wait between)"


def unfenced(deed: str, whose: str = PLACE) -> str:
    return rf"{PLACE} needs a fence: {deed} {LINE} what {whose} writes {LINE} with no fence_async between: {WHERE}"


FINDINGS = {
    "boxes_no_wait": UNTOLD,
    "boxes_parity": rf"({UNTOLD}|{TOO_EARLY})",
    "boxes_expectation": rf"({UNTOLD}|{TOO_EARLY})",
    "boxes_few_bytes": rf"({FEW_BYTES}|{LACKING} 0 arrivals and -256 bytes)",
    "boxes_init_fence": rf"{PLACE} calls copy_tensor {LINE} on an mbarrier that {PLACE} initialises {LINE} with no "
    "mbarrier_init_fence between",
    "boxes_slots": rf"({UNTOLD}|{TOO_EARLY}|{LACKING})",
    "boxes_misaligned": rf"{PLACE} copies a box to or from an address that is not a multiple of 128 {LINE}",
    "boxes_coordinates": rf"{PLACE} gives 1 coordinates to a tensor map of 2 dimensions {LINE}",
    "boxes_fence": unfenced("its copy writes"),
    "boxes_left_behind": rf"{BLOCK} ends with no mbarrier_wait for a bulk copy to it {LINE}",
    "stores_fence": unfenced("its copy reads"),
    "stores_fence_behind": unfenced("its copy reads"),
    "stores_sync": rf"({UNWRITTEN}|{PLACE} races: its copy reads {LINE} what {PLACE} writes {LINE} with no barrier "
    rf"between: {WHERE})",
    "stores_wait": rf"{PLACE} races: writes {LINE} what a store of {PLACE} reads {LINE} with no wait_store_reads "
    rf"between: {WHERE}",
    "stores_exit": rf"{PLACE} exits with no wait_store_reads for its store {LINE}, which reads the block's shared "
    "memory",
    "stores_read_back": rf"{PLACE} races: reads {LINE} what a store of {PLACE} writes {LINE} with no wait_stores "
    "between: byte 0 of out",
    "fetch_what_was_written": rf"{PLACE} needs a fence: its copy reads {LINE} what {PLACE} writes {LINE} with no "
    "fence_async between: byte 12 of out",
    "additions": rf"{PLACE} races: its copy (?:writes|changes atomically) {LINE} what a store of {PLACE} "
    rf"(?:writes|changes atomically) {LINE} with no (?:wait_stores|barrier) between: byte 0 of out",
    "copies_that_arrive": rf"({UNWRITTEN}|{PLACE} races: reads {LINE} what a copy of {PLACE} writes {LINE} with no "
    rf"wait_copies between: {WHERE})",
    "products_no_wait": rf"{PLACE} reads {LINE} accumulators of a product {LINE} with no wgmma_wait between",
    "products_wait_one": rf"{PLACE} reads {LINE} accumulators of a product {LINE} with no wgmma_wait between",
    "products_no_fence": rf"{PLACE} calls wgmma {LINE} with no wgmma_fence before",
    "products_touched": rf"{PLACE} calls wgmma {LINE} on accumulators that it has touched since its last wgmma_fence",
    "products_no_fence_async": unfenced("its product reads", f"(?:a copy of )?{PLACE}"),
    "products_copies_unfenced": unfenced("its product reads", f"a copy of {PLACE}"),
    "products_overwritten": rf"{PLACE} races: writes {LINE} what {PRODUCT}",
    "products_registers": rf"{PLACE} writes {LINE} fragments of a product {LINE} with no wgmma_wait between",
    "products_branches": rf"{PLACE} calls wgmma {LINE} where {PLACE} of its warpgroup calls wgmma {LINE}",
    "products_warp": rf"{PLACE} calls wgmma {LINE} where {PLACE} of its warpgroup calls wgmma {LINE}",
    "products_descriptors": rf"{PLACE} calls wgmma {LINE} with other descriptors than the rest of its warpgroup",
    "products_outside": rf"{PLACE} reads 16 bytes at byte \d+ of dynamic shared memory, which has 4096 {LINE}",
    "products_pattern": rf"{PLACE} calls wgmma {LINE} with a tile of which the swizzle's pattern begins 128 bytes "
    "behind a multiple of 256 and its base offset, where it must begin",
    "early_release": rf"{PLACE} races: its copy writes {LINE} what {PRODUCT}",
    "product_of_three_warps": rf"{PLACE} calls wgmma {LINE}, which takes a whole warpgroup, in a block of 96 threads",
    "neighbours_begin": rf"{PLACE} writes {LINE} shared memory of {BLOCK}, which may not have begun: there is no "
    "cluster_wait before",
    "neighbours_order": rf"({RACE}|{UNWRITTEN})",
    "neighbours_relaxed": RACE,
    "neighbours_end": rf"{BLOCK} ends while {PLACE} uses its shared memory {LINE} with no cluster_wait between",
    "neighbours_twice": rf"{PLACE} calls cluster_arrive {LINE} twice with no cluster_wait between",
    "neighbours_alone": rf"{PLACE} calls cluster_wait {LINE} with no cluster_arrive before",
    "neighbours_beyond": rf"{PLACE} maps an address to block 2 of a cluster that has 2 {LINE}",
    "neighbours_warp": rf"deadlock in {BLOCK}: (?:{BLOCK}, threads 0-31 at __syncthreads {LINE}; {BLOCK}, threads "
    rf"32-127 at cluster_wait {LINE}(?:; )?){{2}}",
    "variables_begin": rf"({PLACE} uses {LINE} shared memory of {BLOCK}, which may not have begun: there is no "
    rf"cluster_wait before|{PLACE} calls copy_tensor {LINE} on what no thread has initialised as an mbarrier|{PLACE} "
    rf"writes {LINE} shared memory of {BLOCK}, which may not have begun: there is no cluster_wait before)",
    "variables_order": rf"({RACE}|{UNWRITTEN})",
    "variables_barrier": rf"({UNTOLD}|{UNWRITTEN}|{BLOCK} ends with no mbarrier_wait for a bulk copy to it {LINE})",
    "variables_bounds": rf"{PLACE} writes 4 bytes at byte 512 of shared own of the cluster's block \d, which has 512 "
    rf"{LINE}",
    "message": MESSAGE,
    "message_arrival": MESSAGE,
    "fence_for_a_neighbour": unfenced("its copy reads"),
    "multicasts_begin": rf"({PLACE} uses {LINE} shared memory of {BLOCK}, which may not have begun: there is no "
    rf"cluster_wait before|{PLACE} calls mbarrier_try_wait {LINE} on (what no thread has initialised as an mbarrier|an "
    rf"mbarrier that {PLACE} initialises {LINE} with no barrier between: {WHERE}))",
    "multicasts_wait": rf"{BLOCK} ends with no mbarrier_wait for a bulk copy to it {LINE}",
    "multicasts_bytes": rf"({FEW_BYTES}|{UNTOLD}|{UNWRITTEN})",
    "multicasts_mask": rf"{PLACE} copies a box to blocks 7, of which not all are in its cluster of 2 {LINE}",
    "register_pool": rf"deadlock in {BLOCK}: .*at increase_registers {LINE}; {BLOCK} has \d+ free registers",
    "register_limit": rf"{PLACE} keeps 136 registers {LINE}, more than the 128 that it has",
}


@functools.cache
def program() -> Path:
    return simulator.build("simulator_hopper_cases") / "simulator_hopper_cases"


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
        assert re.fullmatch(rf"\w+<true(?:, \(\w+\)\d+)?>: (?:{FINDINGS[case]}).*", found), found


@pytest.mark.parametrize("case", FINDINGS)
def test_the_same_kernel_without_the_mistake_gives_equal_results_under_every_schedule(case: str):
    results = set(findings(case, "fixed"))
    assert len(results) == 1 and re.fullmatch(r"ok [\d.e+]+", results.pop()), results


def test_products_are_made_at_any_lawful_moment():
    """How many of 32 are there though none needs to be."""
    made = [float(found.removeprefix("ok ")) for found in findings("one_look_at_each_product", "fixed")]
    assert made[:2] == [0, 32], "forward: as late as possible; reversed: at once"
    assert all(0 < count < 32 for count in made[3:7]), "random: some"


# ---- shared variables of clusters ------------------------------------------------------------------------------------

GIVEN = (np.arange(256) % 7.0).reshape(2, 128)  # by each of two blocks
TURNED, OTHERS = GIVEN[:, ::-1], GIVEN[::-1]


def chunks_turned() -> np.ndarray:
    """Of four numbers, their order in reverse; to the first of each 100 times the second of the other block's."""
    own, others = (x.reshape(2, 32, 4)[:, ::-1] for x in (GIVEN, OTHERS))
    result = own.copy()
    result[..., 0] += 100 * others[..., 1]
    return result.reshape(2, 128)


def rounds() -> np.ndarray:
    x = GIVEN
    for _ in range(6):
        x = 0.5 * x + x[::-1, ::-1]
    return x


RESULTS = {
    "copies": TURNED,
    "bulk_copies": TURNED,
    "bulk_stores": 2 * GIVEN,
    "boxes": GIVEN,
    "matrices": GIVEN.reshape(2, 32, 4)[:, ::-1].reshape(2, 128),
    "atomics": np.repeat([[127_128.0], [127_256.0]], 128, axis=1),
    "messages": TURNED + 10 * OTHERS,
    "own_address": chunks_turned(),
    "rounds": rounds(),
}


@pytest.mark.parametrize("way", RESULTS)
def test_variables_of_a_block_are_its_own_in_every_way_to_use_them(way: str):
    expected = float(np.sum(RESULTS[way].reshape(-1) * np.arange(1, 257)))
    for found in findings(f"cluster_{way}", "fixed"):
        assert float(found.removeprefix("ok ")) == pytest.approx(expected, rel=1e-8)


def test_shared_variables_are_each_block_s_own():
    given = np.arange(256).reshape(2, 128) % 7
    boxes = np.concatenate([(np.arange(4)[:, None] + 4 * b) * 32 + np.arange(32) for b in range(2)]).reshape(2, 128) % 7
    turned = (given + 2 * given[::-1] + 3 * boxes[0] + 4 * boxes[1])[:, ::-1].reshape(-1)
    expected = float(np.sum(turned * np.arange(1, 257)))
    assert {float(found.split()[1]) for found in findings("variables_order", "fixed")} == {expected}
