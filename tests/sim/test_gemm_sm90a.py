"""Products of matrices on Hopper (csrc/cuda/gemm_sm90a.cuh, gemm_sm90a.cu) in the simulator: every way in which
operands lie, edges of tiles, results by boxes and by vectors, parts of k, what the other core takes instead, equal
bits, broken lines.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.testing.simulator import SCHEDULES

from .harness import Break, assert_caught
from .test_gemm import HALVES, NOTHING, WAYS, assert_right, lying, module, operands, parts_of, product, room

HEAVY = (pytest.mark.heavy,)
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=str)
HOPPER = {"core": "sm90a", "multiple": 8}  # rows that are not whole chunks of 16 bytes are padded


def matrices(m: int, n: int, k: int, way: str, dtype: torch.dtype) -> list[Tensor]:
    return [lying(x, how, multiple=8) for x, how in zip(operands(m, n, k, dtype), way.split(), strict=True)]


# Less than a tile, whole tiles, more than one in each direction; k of one step, of more than the ring holds. Results of
# 16 bits go by boxes, of one tile's width or half of it; float32, or with a matrix added, by vectors.
@pytest.mark.parametrize("m, n, k", [(5, 3, 8), (128, 128, 64), (256, 256, 64), (300, 270, 100), (131, 40, 400)])
@pytest.mark.parametrize("wide", [False, True], ids=["boxes", "vectors"])
@DTYPES
def test_products_of_every_size(native, dtype: torch.dtype, wide: bool, m: int, n: int, k: int):
    for order in SCHEDULES:
        native.set_schedule(order, 7)
        assert_right(m, n, k, "rows columns", dtype, wide=wide, residual=order == "random", **HOPPER)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [72, 200])  # of a tile of 128, of 256
@DTYPES
def test_products_of_every_layout(native, dtype: torch.dtype, n: int, way: str):
    native.set_schedule("random", 3)
    native.take_left()
    for wide in (False, True):
        assert_right(150, n, 90, way, dtype, wide=wide, **HOPPER)
    assert native.take_left() == []


@pytest.mark.parametrize("way", WAYS)
def test_two_products_in_one_sum(native, way: str):
    """The bits of one product over both depths, where the first is whole stages; by boxes and by vectors."""
    a, b, a2, b2 = (x for half in (0, 1) for x in matrices(140, 72, 128 + half, way, torch.bfloat16))
    a2, b2 = a2[:, :128], b2[:128]
    whole = [lying(torch.cat(x, d), how, multiple=8) for x, d, how in zip(((a, a2), (b, b2)), (1, 0), way.split())]  # noqa: B905
    for dtype in (torch.bfloat16, torch.float32):
        together = product(a, b, dtype, a2=a2, b2=b2, **HOPPER)
        assert torch.equal(together, product(*whole, dtype, **HOPPER))


# Four parts of one tile, the last of less; two of two; none of three. By vectors, results of 16 bits too.
@pytest.mark.parametrize(
    "m, n, k, parts", [(40, 72, 2100, 4), (60, 40, 1100, 2), (300, 40, 1100, 2), (600, 40, 1100, 0)]
)
def test_parts_of_a_deep_k(native, many_multiprocessors, m: int, n: int, k: int, parts: int):
    for dtype, wide, way in zip(HALVES, (False, True), WAYS[1:], strict=True):
        sums = room()
        assert_right(m, n, k, way, dtype, wide=wide, room=sums, **HOPPER)
        assert parts_of(torch.empty(m, n), sums) == parts


def test_equal_bits_under_every_schedule_when_blocks_take_several_tiles(native):
    """Three multiprocessors hold one cluster: it takes all tiles."""
    a, b = matrices(520, 600, 70, "rows columns", torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        found = []
        for order in SCHEDULES:
            native.set_schedule(order, 5)
            found.append(product(a, b, dtype, **HOPPER))
        assert all(torch.equal(other, found[0]) for other in found[1:])
    torch.testing.assert_close(found[0], a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def test_a_result_may_be_added_to_itself(native):
    a, b = matrices(70, 40, 33, "rows rows", torch.float16)
    sums = torch.ones(70, 40)
    native.gemm(**NOTHING | {"a": a, "b": b, "added": sums, "out": sums, "core": "sm90a"})
    torch.testing.assert_close(sums.double(), 1 + a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_what_tma_cannot_fetch_is_told_and_left_to_the_other_core(native):
    whole = torch.randn(16, 32).bfloat16()
    for matrix, said in [
        (whole, ""),
        (whole.T, ""),
        (whole[:1, :3], ""),
        (whole[:, 1:9], "data at an odd address; allowed: multiples of 16 bytes"),
        (
            torch.empty(16, 20).bfloat16()[:, :16],
            "a (16, 16): dimension 0 has a stride of 40 bytes; allowed: multiples of 16",
        ),
        (whole.T[1:9], "data at an odd address"),
        (whole[:1].expand(4, 32), "dimension 0 has a stride of 0 bytes"),
        (whole[:, :0], "dimension 1 has size 0"),
    ]:
        product(matrix, torch.ones(matrix.shape[1], 8).bfloat16(), torch.float32, core="sm90a")
        found = native.take_left()
        assert said in found[0] if said else not found
        product(matrix, torch.ones(matrix.shape[1], 8).bfloat16(), torch.float32, core="sm80")
        assert not native.take_left(), "nothing was asked of Hopper's core"
    for way in WAYS:  # rows that begin anywhere, then nothing to multiply
        assert_right(67, 140, 75, way, torch.bfloat16, offset=3, core="sm90a")
    for way in WAYS:
        assert_right(5, 8, 1, way, torch.bfloat16, core="sm90a")
    bias = torch.randn(9)
    empty = product(torch.ones(5, 0).half(), torch.ones(0, 9).half(), torch.float32, bias=bias, core="sm90a")
    assert torch.equal(empty[3], bias)


def test_results_whose_rows_begin_anywhere(native):
    """Operands by TMA, results by vectors or elements."""
    a, b = matrices(67, 140, 75, "rows rows", torch.bfloat16)
    for pad in (1, 4, 8):
        ours = product(a, b, torch.bfloat16, pad=pad, core="sm90a")
        assert torch.equal(ours, product(a, b, torch.bfloat16, **HOPPER))


# ---- one line broken -------------------------------------------------------------------------------------------------

CORE = ("gemm_sm90a", "gemm_sm90a.cuh")
LINE = r"\(gemm_sm90a\.cuh:\d+\)"
BREAKS: dict[str, Break] = {
    "no wait for a stage": (
        *CORE, "ptx::mbarrier_wait(&shared.full[s], turn.parity);", "",
        rf"product reads {LINE} what a bulk copy writes {LINE} with no mbarrier_wait|"
        "reads shared memory that no thread",
    ),
    "wrong parity": (
        *CORE, "ptx::mbarrier_wait(&shared.full[s], turn.parity);",
        "ptx::mbarrier_wait(&shared.full[s], turn.parity ^ 1);",
        "with no mbarrier_wait between|reads shared memory that no thread|deadlock|what a product of",
    ),
    "a stage is fetched into at once": (
        *CORE, "ptx::mbarrier_wait_cluster(&shared.empty[s], turn.parity ^ 1);", "",
        "its copy writes .* what a product of|with no mbarrier_wait between|deadlock|where its mbarrier's phase waits",
    ),
    "waits for the other block in its own scope": (
        *CORE, "ptx::mbarrier_wait_cluster(&shared.empty[s]", "ptx::mbarrier_wait(&shared.empty[s]",
        "its copy writes .* what a (?:product of|bulk copy) .* with no",
    ),
    "too few bytes expected": (
        *CORE, "Shared<columns>::kStageBytes);", "Shared<columns>::kStageBytes - 128);",
        "it expects fewer bytes than come|with no mbarrier_wait between|deadlock|reads shared memory that no thread",
    ),
    "given back while multiplied": (
        *CORE, "ptx::wgmma_wait<1>();\n        if (step > item.from) give_back(&shared.empty[before]);",
        "give_back(&shared.empty[s]);",
        "its copy writes .* what a product of .* with no wgmma_wait between|where its mbarrier's phase waits for bytes",
    ),
    "stage given back too soon": (
        *CORE, "give_back(&shared.empty[before]);\n        before = s;",
        "give_back(&shared.empty[s]);\n        before = s;",
        "its copy writes .* what a product of .* with no wgmma_wait between|where its mbarrier's phase|deadlock",
    ),
    "given back to the own block alone": (
        *CORE, "block < kCluster; ++block) ptx::mbarrier_arrive", "block < 1; ++block) ptx::mbarrier_arrive",
        "deadlock",
    ),
    "sums read while under way": (
        *CORE, "ptx::wgmma_wait<0>(d);\n      give_back", "give_back",
        "accumulators of a product .* with no wgmma_wait between|what a product of .* with no wgmma_wait",
    ),
    "boxes not shown to the unit": (
        *CORE, "      ptx::fence_async_shared();\n", "",
        f"its copy reads {LINE} what .* writes .* with no fence_async between",
    ),
    "boxes written while stored": (
        *CORE, "if (t == 0) ptx::wait_store_reads<1>();", "",
        "what a store of .* reads .* with no wait_store_reads between",
    ),
    "boxes left behind": (
        *CORE, "  if (threadIdx.x % 128 == 0) ptx::wait_store_reads<0>();\n", "",
        "exits with no wait_store_reads for its store",
    ),
    "no barrier before the store": (
        *CORE, "      ptx::fence_async_shared();\n      ptx::barrier_sync(group, 128);\n",
        "      ptx::fence_async_shared();\n",
        "its copy reads .* what .* with no barrier between|reads shared memory that no thread",
    ),
    "no cluster barrier at the end": (
        *CORE, "  ptx::cluster_sync();  // no block ends", "  // no block ends",
        "ends while .* uses its shared memory|uses .* shared memory of .*, which has ended",
    ),
    "no cluster barrier at the beginning": (
        *CORE, "  ptx::cluster_sync();\n  if (warp < 4)", "  __syncthreads();\n  if (warp < 4)",
        "which may not have begun",
    ),
    "more registers than there are": (
        "gemm_sm90a", "wgmma_tile.cuh", "kManyRegisters = 232", "kManyRegisters = 240",
        "deadlock .* at increase_registers .* free registers",
    ),
    "wrong swizzle of boxes": (*CORE, "((c + lane / 16) ^ line % 8) * 8", "(c + lane / 16) * 8", "exceeds"),
    "wrong advance along k": (
        *CORE, "across ? kPerProduct * 128 : kPerProduct * 2;", "across ? kPerProduct * 128 : kPerProduct * 4;",
        "exceeds|with a tile of which the swizzle's pattern begins",
    ),
    "wrong half of b": (
        *CORE, "shared.b[s] + block * kShare * kDepth", "shared.b[s] + (1 - block) * kShare * kDepth", "exceeds|races",
    ),
    "bias of other columns": (*CORE, "place.column + lane % 4 * 2);", "lane % 4 * 2);", "exceeds"),
    "bias past the last column": (*CORE, "if (column >= columns) continue;", "", "past the end of bias"),
    "the second product's k": (
        *CORE, "(step - product * tiles.steps_of_product) * depth", "step * depth", "exceeds|differ",
    ),
    "panels are read too soon": (
        *CORE, "    __syncwarp();\n#pragma unroll 1\n    for (int row", "#pragma unroll 1\n    for (int row",
        "races|no thread",
    ),
    "panels are written too soon": (*CORE, "    __syncwarp();  // what lay there has been read\n", "", "races"),
    "the first panel again": (*CORE, "store<sides>(d, q * kPart)", "store<sides>(d, 0)", "exceeds"),
    "rows of panels change places": (*CORE, "^ row % 4 * 2) * 4", "^ row % 2 * 2) * 8", "exceeds|races|past|outside"),
}  # fmt: skip


def attempt() -> None:
    module().set_schedule("random", 4)
    for n, wide in ((270, False), (200, True)):
        assert_right(300, n, 400, "rows columns", torch.bfloat16, wide=wide, **HOPPER)
    a, b = matrices(40, 72, 64, "rows rows", torch.bfloat16)
    twice = product(a, b, torch.float32, a2=a, b2=b, **HOPPER)
    once = product(a, b, torch.float32, **HOPPER)
    assert torch.allclose(twice, 2 * once, rtol=1e-4, atol=1e-4), "two products differ"


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    attempt()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 3 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
