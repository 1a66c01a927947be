"""The gradients' norm in the simulator: more tensors than a launch takes, chunks, squares that no float holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine.optim import gradient_norm
from llmengine.testing.simulator import SCHEDULES

from .harness import DTYPES, Break, assert_caught


def tensors(*sizes: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(size + offset, generator=g).to(dtype)[offset:] for size in sizes]


def assert_norm(given: list[Tensor]) -> Tensor:
    exact = torch.cat([t.double() for t in given]).square().sum().sqrt().float()
    with llmengine.backend("cuda_sim"):
        found = gradient_norm(given)
    assert abs(found / exact - 1) <= torch.finfo(torch.float32).eps, f"differs: {found} is not {exact}"
    return found


@DTYPES
def test_tensors_of_every_size(native, dtype: torch.dtype):
    norms = []
    for order in SCHEDULES:
        native.set_schedule(order, 3)
        norms.append(assert_norm(tensors(1, 0, 8192, 8193, 5, 20_001, dtype=dtype)))
    assert all(torch.equal(norm, norms[0]) for norm in norms), "equal bits under every schedule"
    assert_norm(tensors(30, 9001, dtype=dtype, offset=1))


def test_more_tensors_than_a_launch_takes(native):
    assert_norm(tensors(*(1, 3, 0, 7) * 100))


def test_squares_that_no_float_holds(native):
    assert_norm([torch.tensor([3e30, -4e30]), torch.tensor([1e-30])])
    assert_norm([torch.tensor([3e-30, -4e-30])])


def test_dtypes_may_be_mixed(native):
    assert_norm(tensors(40, 50) + tensors(60, dtype=torch.bfloat16))


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt() -> None:
    assert_norm(tensors(8193, 3))
    assert_norm(tensors(*[2] * 200))
    assert_norm(tensors(10, offset=1))
    assert_norm([torch.full((4,), 1e30)])


NORM = ("gradient_norm", "gradient_norm.cu")
BREAKS: dict[str, Break] = {
    "the end of a tensor": (
        *NORM, "rest < kNormChunk ? static_cast<int>(rest) : static_cast<int>(kNormChunk)",
        "static_cast<int>(kNormChunk)", "past the end|across its end|differs",
    ),
    "sums of another launch": (*NORM, "given.sums += given.table.blocks;", "", "differs"),
    "every thread's sum": (*NORM, "if (threadIdx.x == 0) p.sums", "p.sums", "races: writes .* of sums"),
    "squares in float": (*NORM, "static_cast<double>(x[i]) * static_cast<double>(x[i])", "x[i] * x[i]", "differs"),
    "no barrier": ("gradient_norm", "reduce.cuh", "__syncthreads();", "", "reads shared memory that no thread|races"),
    "unaligned taken for aligned": (
        *NORM, "reinterpret_cast<uintptr_t>(chunk) % 16 == 0", "true", "not a multiple of",
    ),
    "a chunk of the tensor before": (
        "gradient_norm", "tensor_list.cuh", "first[middle] <= block", "first[middle] < block", "past|differs|reads",
    ),
}  # fmt: skip


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    native.set_schedule("random", 1)
    attempt()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
