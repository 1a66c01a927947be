"""Products of matrices (csrc/cuda/gemm.cu, gemm_sm80.cuh, gemm_sm80.cu) and sums of columns (column_sums.cu) in the
simulator: every way in which operands lie, edges of tiles, parts of k, rows that begin anywhere, equal bits, refusals,
broken lines. The other core: test_gemm_sm90a.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.backends import cuda_sim
from llmengine.testing import LAYOUTS, assert_law
from llmengine.testing.law import OUTPUT
from llmengine.testing.simulator import SCHEDULES

from .harness import DTYPES, Break, assert_caught

HEAVY = (pytest.mark.heavy,)
HALVES = (torch.bfloat16, torch.float16)
# How a (m, k) and b (k, n) lie: rows in memory, or columns.
WAYS = ("rows rows", "rows columns", "columns rows")


def module():
    """The one under test: where a line is broken, another than llmengine's."""
    assert cuda_sim.NATIVE.missing() is None
    return cuda_sim.NATIVE.module


def lying(x: Tensor, how: str, offset: int = 0, multiple: int = 1) -> Tensor:
    """x by rows or columns, `offset` elements past a multiple of 16 bytes, with rows that far apart, too, or a multiple
    of so many elements."""
    x = x if how == "rows" else x.T
    wide = -(-(x.shape[1] + offset) // multiple) * multiple
    room = torch.full((x.shape[0], wide), torch.nan, dtype=x.dtype)[:, offset : offset + x.shape[1]]
    room.copy_(x)
    return room if how == "rows" else room.T


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(m + 7 * n + 49 * k)
    return torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(dtype)


NOTHING = dict.fromkeys(("a2", "b2", "bias", "added", "room")) | {"core": "sm80", "stream": 0}


def product(a: Tensor, b: Tensor, dtype: torch.dtype, *, pad: int = 0, multiple: int = 1, **given) -> Tensor:
    """Into rows that begin `pad` elements past a multiple of 16 bytes, or a multiple of so many apart."""
    n = b.shape[1]
    out = torch.full((a.shape[0], -(-(n + pad) // multiple) * multiple), torch.nan, dtype=dtype)
    module().gemm(**NOTHING | {"a": a, "b": b, "out": out[:, pad : pad + n]} | given)
    assert out[:, :pad].isnan().all() and out[:, pad + n :].isnan().all()
    return out[:, pad : pad + n]


def assert_right(
    m: int, n: int, k: int, way: str, dtype: torch.dtype, *, wide: bool = False, offset: int = 0, multiple: int = 1,
    residual: bool = False, **given,
) -> None:  # fmt: skip
    """Against float64, with a bias and a matrix added to a result in float32, a bias alone to one in 16 bits; residual:
    added to either is a matrix of the operands' dtype."""
    a, b = operands(m, n, k, dtype)
    bias = torch.randn(n).to(torch.float32 if m % 2 else dtype)
    added = torch.randn(m, n).to(dtype if residual else torch.float32) if wide or residual else None
    first, second = way.split()
    out = torch.float32 if wide else dtype
    lies = [lying(x, how, offset, multiple) for x, how in ((a, first), (b, second))]
    more = None if added is None else lying(added, "rows", offset, multiple)
    ours = product(*lies, out, pad=offset, multiple=multiple, bias=bias, added=more, **given)
    what, oracle = f"{m} x {n} x {k} {way} {dtype}", a.double() @ b.double() + bias.double()
    plain = (a @ b + bias).to(dtype)
    if added is not None:
        oracle, plain = oracle + added.double(), plain + added
    if not wide:
        return assert_law(ours, plain, oracle, OUTPUT, what)
    # tensor cores cut a sum to a float after every 8 of k; two additions are rounded
    allowed = (k / 8 + 3) * 2**-23 * (a.double().abs() @ b.double().abs() + bias.double().abs() + added.double().abs())
    assert ((ours - oracle).abs() <= allowed).all(), f"{what}: error exceeds {allowed.max()}"


# Less than a block of the tensor cores; one short of a tile, whole, one more; less than a stage, whole ones, and some.
SIZES = [(1, 1, 1), (5, 40, 24), (127, 64, 32), (128, 128, 96), (129, 130, 65), (64, 257, 161), (300, 9, 8)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("m, n, k", SIZES)
def test_edges_of_tiles(native, m: int, n: int, k: int, way: str):
    for dtype, wide in zip(HALVES, (m % 2 == 0, m % 2 == 1), strict=True):
        assert_right(m, n, k, way, dtype, wide=wide)
        assert_right(m, n, k, way, dtype, wide=wide, residual=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_rows_that_begin_anywhere(native, way: str, offset: int):
    for wide in (False, True):
        assert_right(67, 140, 75, way, HALVES[offset % 2], wide=wide, offset=offset, residual=offset > 1)


def test_rows_that_lie_beyond_32_bits(native):
    """Of every matrix, results too."""
    huge = LAYOUTS["huge stride"]
    for way in WAYS:
        a, b = operands(7, 6, 5, torch.bfloat16)
        expected = product(*(lying(x, how) for x, how in zip((a, b), way.split(), strict=True)), torch.float32)
        far = [huge(x if how == "rows" else x.T) for x, how in zip((a, b), way.split(), strict=True)]
        far = [x if how == "rows" else x.T for x, how in zip(far, way.split(), strict=True)]
        out = huge(torch.zeros(7, 6))
        native.gemm(**NOTHING | {"a": far[0], "b": far[1], "added": out, "out": out})
        assert torch.equal(out, expected) and out.stride(0) * 6 > 2**31


def test_more_tiles_than_a_group_has_rows(native):
    assert_right(9 * 128 + 3, 2 * 128 + 1, 8, "rows rows", torch.bfloat16)


def test_sums_of_nothing_are_the_bias(native):
    bias = torch.randn(9)
    assert torch.equal(product(torch.ones(5, 0).half(), torch.ones(0, 9).half(), torch.float32, bias=bias)[3], bias)
    assert product(torch.ones(0, 4).half(), torch.ones(4, 9).half(), torch.float16).shape == (0, 9)
    assert product(torch.ones(3, 4).half(), torch.ones(4, 0).half(), torch.float16).shape == (3, 0)


def test_a_result_may_be_added_to_itself(native):
    a, b = operands(70, 40, 33, torch.float16)
    sums = torch.ones(70, 40)
    native.gemm(**NOTHING | {"a": a, "b": b, "added": sums, "out": sums})
    torch.testing.assert_close(sums.double(), 1 + a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def assert_two_products(m: int, n: int, k: int, way: str, dtype: torch.dtype) -> None:
    """The bits of one product over both depths, where the first is a whole number of stages."""
    a, b = operands(m, n, 2 * k, dtype)
    parts = [[lying(x, how) for x in x.split(k, d)] for d, x, how in zip((1, 0), (a, b), way.split(), strict=True)]
    (a1, a2), (b1, b2) = parts
    whole = product(*(lying(x, how) for x, how in zip((a, b), way.split(), strict=True)), torch.float32)
    assert torch.equal(product(a1, b1, torch.float32, a2=a2, b2=b2), whole), "two products differ from one"


@pytest.mark.parametrize("way", WAYS)
def test_two_products_in_one_sum(native, way: str):
    assert_two_products(140, 67, 96, way, torch.bfloat16)
    for k in (0, 5):
        (a, b), (a2, b2) = (operands(m, 20, k, torch.float16) for m in (40, 40))
        ours = product(a, b, torch.float32, a2=a2, b2=b2)
        torch.testing.assert_close(
            ours.double(), a.double() @ b.double() + a2.double() @ b2.double(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("way", WAYS)
def test_every_schedule_gives_equal_bits(native, way: str):
    a, b = operands(140, 130, 100, torch.bfloat16)
    found = []
    for order in SCHEDULES:
        native.set_schedule(order, 5)
        found.append(product(*(lying(x, how) for x, how in zip((a, b), way.split(), strict=True)), torch.float32))
    assert all(torch.equal(found[0], other) for other in found[1:])


# ---- parts of k ------------------------------------------------------------------------------------------------------

ROOM = 6 * 128 * 128  # of the simulator's three multiprocessors, two tiles each


def room(elements: int = ROOM) -> Tensor:
    return torch.full((elements,), torch.nan)


def parts_of(out: Tensor, sums: Tensor) -> int:
    """How many parts there were, by what of the room was written."""
    written = int(sums.isfinite().sum())
    assert written % out.numel() == 0
    return written // out.numel()


# Fewer steps than a part wants; six, of which the last has less, and three parts of one tile; two of three tiles;
# rows that no vector fits.
DEEP = [(40, 72, 1000, 0), (40, 72, 3100, 6), (60, 33, 1600, 3), (300, 100, 1100, 2)]


@pytest.mark.parametrize("m, n, k, parts", DEEP)
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_deep_k(native, way: str, m: int, n: int, k: int, parts: int):
    for dtype, wide in zip(HALVES, (False, True), strict=True):
        sums = room()
        assert_right(m, n, k, way, dtype, wide=wide, room=sums, residual=not wide)
        assert parts_of(torch.empty(m, n), sums) == parts


def test_parts_end_with_the_room_and_with_work_for_all(native):
    a, b = operands(40, 72, 4096, torch.bfloat16)
    for elements, parts in ((40 * 72 * 2, 2), (40 * 72 * 2 - 1, 0), (0, 0), (ROOM, 6)):
        sums = room(elements)
        out = product(a, b, torch.float32, room=sums)
        assert parts_of(out, sums) == parts
    a, b = operands(40, 600, 1024, torch.bfloat16)  # five tiles of six
    sums = room()
    product(a, b, torch.float32, room=sums)
    assert sums.isnan().all()


def test_parts_give_equal_bits_under_every_schedule(native):
    a, b = operands(40, 72, 1600, torch.bfloat16)
    found = []
    for order in SCHEDULES:
        native.set_schedule(order, 5)
        found.append(product(a, b, torch.bfloat16, room=room(), bias=torch.ones(72)))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_supported_names_itself(native):
    a, b = operands(8, 8, 8, torch.float16)
    for given, said in [
        ({"a": a.float()}, "a has dtype float32; allowed: bfloat16, float16"),
        ({"b": b.bfloat16()}, "b has dtype bfloat16; allowed: float16"),
        ({"b": b[:7]}, r"b has shape \(7, 8\); expected \(8, 8\)"),
        ({"a": torch.ones(16, 16).half()[::2, ::2]}, "a must have a unit stride"),
        ({"a": a.T, "b": b.T}, "b must have last stride 1 where a has not, got 8"),
        ({"a2": a}, "b2 is wanted with a2, and only with it"),
        ({"a2": a.T, "b2": b}, "a2 must have its unit stride where the first operand has"),
        ({"added": torch.ones(8, 8).bfloat16()}, "added has dtype bfloat16; allowed: float16, float32"),
        ({"added": torch.ones(8, 9)}, r"added has shape \(8, 9\); expected \(8, 8\)"),
        ({"room": torch.ones(8).half()}, "room has dtype float16; allowed: float32"),
        ({"core": "sm70"}, "core is 'sm70'; allowed: 'sm80', 'sm90a'"),
    ]:
        with pytest.raises(ValueError, match=said):
            native.gemm(**NOTHING | {"a": a, "b": b, "out": torch.empty(8, 8)} | given)


# ---- sums of columns -------------------------------------------------------------------------------------------------


def assert_column_sums(rows: Tensor, parts: int) -> None:
    sums = torch.full((rows.shape[1],), torch.nan)
    partial = torch.full((parts, rows.shape[1]), torch.nan) if parts else None
    module().column_sums(rows=rows, partial=partial, sums=sums, stream=0)
    assert_law(sums, rows.float().sum(0), rows.double().sum(0), OUTPUT, f"{tuple(rows.shape)} {parts}")


@DTYPES
def test_sums_of_columns(native, dtype: torch.dtype):
    g = torch.Generator().manual_seed(4)
    for (rows, columns), parts in itertools.product(((1, 1), (7, 300), (131, 33), (0, 5)), (0, 1, 3)):
        assert_column_sums(torch.randn(rows, columns, generator=g).to(dtype), parts)
    assert_column_sums(torch.randn(40, 51, generator=g).to(dtype)[:, 2:], 2)


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt() -> None:
    for way, wide in (("rows rows", False), ("rows columns", True), ("columns rows", True)):
        assert_right(133, 140, 105, way, HALVES[wide], wide=wide, residual=way == "rows rows")
    assert_right(67, 70, 75, "columns rows", HALVES[0], offset=3)
    assert_right(9 * 128, 129, 8, "rows columns", HALVES[1])
    assert_two_products(40, 70, 64, "rows rows", HALVES[1])
    assert_right(40, 72, 1600, "columns rows", HALVES[0], room=room(), wide=True)
    assert_column_sums(torch.randn(70, 300, generator=torch.Generator().manual_seed(1)), 2)


PRODUCT, KERNEL = ("gemm_sm80", "gemm_sm80.cuh"), ("gemm_sm80", "gemm_sm80.cu")
RESULT, PARTS = ("gemm_sm80", "gemm_result.cuh"), ("gemm", "gemm.cu")
TILES, SUMS = "matrix_tile.cuh", "column_sums"
BREAKS: dict[str, Break] = {
    "a stage is not waited for": (*PRODUCT, "ptx::wait_copies<kStages - 2>();", "", "races: .* what a copy"),
    "a stage too many is on its way": (*PRODUCT, "wait_copies<kStages - 2>", "wait_copies<kStages - 1>", "races"),
    "no barrier between stages": (*PRODUCT, "__syncthreads();  // the stage is there", "//", "races"),
    "stages are mixed up": (*PRODUCT, "kStages - 1 : stage - 1);", "kStages - 1 : stage);", "races"),
    "no groups at the end": (*PRODUCT, "ptx::commit_copies();", "if (step < steps) ptx::commit_copies();", "races"),
    "half of k": (*PRODUCT, "k < kDepth / 16; ++k", "k < kDepth / 32; ++k", "exceeds"),
    "lines of another warp": (*PRODUCT, "2 * m, warp_row() / 8", "2 * m, warp_column() / 8", "exceeds"),
    "columns of another warp": (*PRODUCT, "2 * j, warp_column() / 8", "2 * j, 0", "exceeds"),
    "quarters are mixed up": (
        "gemm_sm80", TILES, "chunk(row + lane_of() % 8 + lane_of() / 16 * 8, c, from + lane_of() / 8 % 2)",
        "chunk(row + lane_of() % 16, c, from + lane_of() / 16)", "exceeds",
    ),
    "k past the last": (*PRODUCT, "stride, depth - k, aligned}, lines - first)",
                        "stride, kDepth, aligned}, lines - first)", "exceeds|past the end|across its end"),
    "lines past the last": (*PRODUCT, "lines - first, aligned}, depth - k)", "kTile, aligned}, depth - k)",
                            "past the end|across its end|in no tensor"),
    "no barrier before the panel": (*PRODUCT, "__syncthreads();  // every warp is done with the stages", "", "races"),
    "the panel is read too soon": (*PRODUCT, "        }\n    __syncwarp();\n", "        }\n", "races|no thread"),
    "the panel is written too soon": (*PRODUCT, "__syncwarp();  // what lay there has been read", "", "races"),
    "the first half twice": (*PRODUCT, "c[m][j][i] = c[m + 2][j][i];", ";", "exceeds"),
    "odd chunks elsewhere": (*PRODUCT, "column / 8 * 4 + column % 4", "column / 8 * 4 + column % 2", "races|exceeds"),
    "tiles of a lower group": (*PRODUCT, "? rows - first : kGroup,", "? kGroup : kGroup,", "races|exceeds|nan"),
    "a row past the last": (*RESULT, "if (row >= rows) return;", "", "past the end of out"),
    "bias of other columns": (*RESULT, "add_line<T>(bias, column,", "add_line<T>(bias, column / 16 * 16,", "exceeds"),
    "rows of `added` past the last": (*RESULT, "if (row >= rows) return x;", "", "past the end of added"),
    "other rows of `added`": (*RESULT, "load_vector(added[row]", "load_vector(added[row / 2]", "exceeds"),
    "the same half of `added`": (*RESULT, "column + 4, columns, added_wide", "column, columns, added_wide", "exceeds"),
    "no barrier between products": (*KERNEL, "if (i > 0) __syncthreads();", "", "races"),
    "the first product twice": (*KERNEL, "i == 0 ? p.b : p.b2", "p.b", "two products differ"),
    "no aligned rows": (*RESULT, "out.aligned, pack", "true, pack", "not a multiple of 16"),
    "parts of k begin with the first": (*KERNEL, "from = part * p.part_depth,", "from = 0,", "exceeds"),
    "parts of k end with the last": (*KERNEL, "from + p.part_depth < p.depth ?", "false ?", "exceeds"),
    "all parts in one place": (*RESULT, "+ part * part_stride", "", "races|exceeds"),
    "a part is left out": (*PARTS, "part < parts; ++part", "part < parts - 1; ++part", "exceeds"),
    "parts have no bias": (
        *PARTS, "           result_of<T>(p));", "           parts_result_of<T>(p));", "exceeds|races|NaN|nan",
    ),
    "sums of seven warps": (SUMS, "column_sums.cu", "w < kSumWarps; ++w", "w < kSumWarps - 1; ++w", "exceeds"),
    "sums are read too soon": (SUMS, "column_sums.cu", "__syncthreads();", "", "races|no thread"),
    "rows of one part": (SUMS, "column_sums.cu", "(gridDim.y) * kSumWarps", "(1) * kSumWarps", "exceeds"),
}  # fmt: skip


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    native.set_schedule("random", 1)
    attempt()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 3 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
