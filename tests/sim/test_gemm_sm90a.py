"""The product of matrices on Hopper (csrc/cuda/gemm_sm90a.cuh) in the simulator: against PyTorch's, under every
schedule, and with lines of it broken.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.backends import cuda_sim
from llmengine.testing import assert_law
from llmengine.testing.law import OUTPUT
from llmengine.testing.simulator import SCHEDULES

from .harness import Break, assert_caught

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LAYOUTS = ["along along", "along across", "across along", "across across"]  # of a and of b, to k


def operands(m: int, n: int, k: int, dtype: torch.dtype, layout: str = "along along") -> tuple[Tensor, Tensor]:
    """(m, k) and (k, n); rows that are not whole chunks of 16 bytes are padded."""
    g = torch.Generator().manual_seed(m + n + k)

    def matrix(lines: int, across: bool) -> Tensor:
        rows, columns = (k, lines) if across else (lines, k)
        padded = torch.randn(rows, -(-columns // 8) * 8, generator=g).to(dtype)[:, :columns]
        return padded.T if across else padded

    a, b = (word == "across" for word in layout.split())
    return matrix(m, a), matrix(n, b).T


def product(module, a: Tensor, b: Tensor) -> Tensor:
    m, n = a.shape[0], b.shape[1]
    out = torch.full((m, -(-n // 8) * 8), torch.nan, dtype=a.dtype)[:, :n]
    module.gemm_sm90a(a=a, b=b, out=out, stream=0)
    return out


def check(module, a: Tensor, b: Tensor) -> None:
    assert_law(product(module, a, b), a @ b, a.double() @ b.double(), OUTPUT, f"{tuple(a.shape)} {tuple(b.shape)}")


# Less than a tile, whole tiles, more than one in each direction; k of one step, of more than the ring holds.
@pytest.mark.parametrize("m, n, k", [(5, 3, 8), (128, 128, 64), (256, 256, 64), (300, 270, 100), (130, 40, 400)])
@DTYPES
def test_products_of_every_size(native, dtype: torch.dtype, m: int, n: int, k: int):
    for order in SCHEDULES:
        native.set_schedule(order, 7)
        check(native, *operands(m, n, k, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [72, 200])  # of a tile of 128, of 256
@DTYPES
def test_products_of_every_layout(native, dtype: torch.dtype, n: int, layout: str):
    native.set_schedule("random", 3)
    check(native, *operands(150, n, 90, dtype, layout))


def test_equal_bits_under_every_schedule_when_blocks_take_several_tiles(native):
    """Three multiprocessors hold one cluster: it takes all tiles."""
    a, b = operands(520, 600, 70, torch.bfloat16)
    found = []
    for order in SCHEDULES:
        native.set_schedule(order, 5)
        found.append(product(native, a, b))
    assert_law(found[0], a @ b, a.double() @ b.double(), OUTPUT, "several tiles")
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_arguments_that_no_kernel_may_see_are_errors(native):
    a, b = operands(16, 16, 16, torch.bfloat16)
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    good = {"a": a, "b": b, "out": out, "stream": 0}
    for change, message in [
        ({"a": a.float()}, "gemm_sm90a: a has dtype float32; allowed: bfloat16, float16"),
        ({"b": b[:8]}, r"gemm_sm90a: b has shape \(8, 16\); expected \(16, 16\)"),
        ({"out": None}, "gemm_sm90a: out is required"),
        ({"a": a[:, :0], "b": b[:0]}, r"gemm_sm90a: a has shape \(16, 0\); allowed: at least one column"),
        ({"a": torch.empty(16, 32, dtype=a.dtype)[:, ::2].expand(16, 16)}, "gemm_sm90a: a has strides in both"),
        (
            {"a": torch.empty(16, 20, dtype=a.dtype)[:, :16]},
            r"tensor map of a \(16, 16\): dimension 0 has a stride of 40",
        ),
        ({"out": out.T}, r"tensor map of out \(16, 16\): the last dimension has stride 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.gemm_sm90a(**(good | change))


# ---- broken lines ----------------------------------------------------------------------------------------------------

CORE = "gemm_sm90a.cuh"
LINE = r"\(gemm_sm90a\.cuh:\d+\)"
BREAKS = {
    "no wait for a stage": (
        "ptx::mbarrier_wait(&shared.full[s], turn.parity);", "",
        rf"product reads {LINE} what a bulk copy writes {LINE} with no mbarrier_wait|"
        "reads shared memory that no thread",
    ),
    "wrong parity": (
        "ptx::mbarrier_wait(&shared.full[s], turn.parity);", "ptx::mbarrier_wait(&shared.full[s], turn.parity ^ 1);",
        "with no mbarrier_wait between|reads shared memory that no thread|deadlock|what a product of",
    ),
    "a stage is fetched into at once": (
        "ptx::mbarrier_wait_cluster(&shared.empty[s], turn.parity ^ 1);", "",
        "its copy writes .* what a product of|with no mbarrier_wait between|deadlock|where its mbarrier's phase waits",
    ),
    "waits for the other block in its own scope": (
        "ptx::mbarrier_wait_cluster(&shared.empty[s]", "ptx::mbarrier_wait(&shared.empty[s]",
        "its copy writes .* what a (?:product of|bulk copy) .* with no",
    ),
    "too few bytes expected": (
        "Shared<columns>::kStageBytes);", "Shared<columns>::kStageBytes - 128);",
        "it expects fewer bytes than come|with no mbarrier_wait between|deadlock|reads shared memory that no thread",
    ),
    "given back while multiplied": (
        "ptx::wgmma_wait<1>();\n      if (step > 0) give_back(&shared.empty[before]);",
        "give_back(&shared.empty[s]);",
        "its copy writes .* what a product of .* with no wgmma_wait between|where its mbarrier's phase waits for bytes",
    ),
    "stage given back too soon": (
        "give_back(&shared.empty[before]);\n      before = s;", "give_back(&shared.empty[s]);\n      before = s;",
        "its copy writes .* what a product of .* with no wgmma_wait between|where its mbarrier's phase|deadlock",
    ),
    "given back to the own block alone": (
        "block < kCluster; ++block) ptx::mbarrier_arrive", "block < 1; ++block) ptx::mbarrier_arrive",
        "deadlock",
    ),
    "sums read while under way": (
        "ptx::wgmma_wait<0>(d);\n    give_back", "give_back",
        "accumulators of a product .* with no wgmma_wait between|what a product of .* with no wgmma_wait",
    ),
    "panels not shown to the unit": (
        "    ptx::fence_async_shared();\n", "", f"its copy reads {LINE} what .* writes .* with no fence_async between",
    ),
    "panels written while stored": (
        "if (t == 0) ptx::wait_store_reads<1>();", "", "what a store of .* reads .* with no wait_store_reads between",
    ),
    "panels left behind": (
        "  if (threadIdx.x % 128 == 0) ptx::wait_store_reads<0>();\n", "",
        "exits with no wait_store_reads for its store",
    ),
    "no barrier before the store": (
        "    ptx::fence_async_shared();\n    ptx::barrier_sync(group, 128);\n", "    ptx::fence_async_shared();\n",
        "its copy reads .* what .* with no barrier between|reads shared memory that no thread",
    ),
    "no cluster barrier at the end": (
        "  ptx::cluster_sync();  // no block ends", "  // no block ends", "ends while .* uses its shared memory",
    ),
    "no cluster barrier at the beginning": (
        "  ptx::cluster_sync();\n  if (warp < 4)", "  __syncthreads();\n  if (warp < 4)", "which may not have begun",
    ),
    "more registers than there are": (
        "kFewRegisters = 40, kManyRegisters = 232", "kFewRegisters = 40, kManyRegisters = 240",
        "deadlock .* at increase_registers .* free registers",
    ),
    "wrong swizzle of panels": ("((c + lane / 16) ^ line % 8) * 8", "(c + lane / 16) * 8", "exceeds"),
    "wrong advance along k": (
        "across ? kPerProduct * 128 : kPerProduct * 2;", "across ? kPerProduct * 128 : kPerProduct * 4;",
        "exceeds|with a tile of which the swizzle's pattern begins",
    ),
    "wrong half of b": (
        "shared.b[s] + block * kShare * kDepth", "shared.b[s] + (1 - block) * kShare * kDepth", "exceeds|races",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line, becomes, said = BREAKS[name]

    def attempt() -> None:
        module = cuda_sim.NATIVE.module
        module.set_schedule("random", 4)
        check(module, *operands(300, 200, 400, torch.bfloat16))

    broken: Break = ("gemm_sm90a", CORE, line, becomes, said)
    assert_caught(broken, attempt, tmp_path, monkeypatch)
