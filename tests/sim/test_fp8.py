"""8-bit floats on Hopper (csrc/cuda/fp8_quantise_sm90a.cu, fp8_product_sm90a.cu) in the simulator: numbers and scales
are the reference's, bit by bit; products of every size, scaling and format, by the law; what is refused; equal bits;
broken lines.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.fp8 import FORMATS, numbers_shape, scales_shape
from llmengine.backends.reference.fp8_linear import quantise, values
from llmengine.testing import assert_law
from llmengine.testing.law import OUTPUT
from llmengine.testing.simulator import SCHEDULES

from .harness import DTYPES, Break, assert_caught

HEAVY = (pytest.mark.heavy,)
BLOCKS = (0, 1, 128)


def module():
    """The one under test: where a line is broken, another than llmengine's."""
    assert cuda_sim.NATIVE.missing() is None
    return cuda_sim.NATIVE.module


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def target(lines: int, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Room, with what no result is."""
    return torch.full(numbers_shape(lines, k), 0xAA, dtype=torch.uint8), torch.full(
        scales_shape(lines, k, block), torch.nan
    )


def quantised(x: Tensor, format: str, block: int, rows: bool = True, columns: bool = True, parts: int = 3):
    (lines, k), nothing = x.shape, (None, None)
    as_rows = target(lines, k, block) if rows else nothing
    as_columns = target(k, lines, block) if columns else nothing
    module().fp8_quantise(
        x=x, format=format, block=block, maxima=torch.full((parts,), torch.nan) if block == 0 else None,
        rows=as_rows[0], row_scales=as_rows[1], columns=as_columns[0], column_scales=as_columns[1], stream=0,
    )  # fmt: skip
    return as_rows, as_columns


def one_nan(numbers: Tensor, format: str) -> Tensor:
    """PyTorch's NaN of 8 bits has a sign, the hardware's has none."""
    return torch.where(numbers.view(FORMATS[format]).float().isnan(), 0x7F, numbers)


def assert_reference(x: Tensor, format: str, block: int, **options) -> None:
    for found, matrix in zip(quantised(x, format, block, **options), (x, x.T), strict=True):
        if found[0] is None:
            continue
        numbers, scales = quantise(matrix, format, block)
        assert torch.equal(found[1], scales), (format, block)
        assert torch.equal(one_nan(found[0], format), one_nan(numbers, format)), (format, block)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (128, 128), (130, 145), (16, 300), (257, 40)], ids=str)
@DTYPES
def test_numbers_and_scales_are_those_of_the_reference(native, dtype: torch.dtype, shape):
    """Each size in all formats and blocks; numbers of many magnitudes, so that all of a format's are met."""
    x = (randn(*shape) * 2.0 ** (torch.arange(shape[1]) % 19 - 9)).to(dtype)
    for i, (format, block) in enumerate(itertools.product(FORMATS, BLOCKS)):
        native.set_schedule(SCHEDULES[i % 4], i)
        assert_reference(x, format, block)


def test_one_side_alone_and_strided_matrices(native):
    native.set_schedule("random", 5)
    x = randn(130, 150).bfloat16()
    for block in BLOCKS:
        for rows, columns in ((True, False), (False, True)):
            assert_reference(x, "e4m3", block, rows=rows, columns=columns)
        assert_reference(randn(60, 90).bfloat16()[1::2, 3:80], "e5m2", block)
        assert_reference(randn(1, 40).expand(20, 40), "e4m3", block)
    for parts in (1, 40, 512):
        assert_reference(x, "e4m3", 0, parts=parts)


@pytest.mark.parametrize("format", FORMATS)
def test_extremes(native, format: str):
    """Zeros of both signs, subnormal floats, the largest, infinities, NaN: each among others, and alone."""
    native.set_schedule("reversed", 5)
    special = [0.0, -0.0, 2.0**-149, -(2.0**-126), 3.4e38, torch.inf, -torch.inf, torch.nan]
    x = randn(40, 150)
    x[::5, ::19] = torch.tensor(special)
    for block in BLOCKS:
        assert_reference(x, format, block)
        for value in special:
            assert_reference(torch.full((3, 20), value), format, block)


# ---- products --------------------------------------------------------------------------------------------------------


def pair(lines: int, k: int, format: str, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers and scales; a line and a column much larger than the others."""
    x = randn(lines, k, seed=seed) / 16
    x[lines // 2] *= 50
    x[:, k // 3] *= 20
    return quantise(x, format, block)


def product(a, b, /, a_format: str = "e4m3", dtype=torch.float32, bias=None, pad: int = 0, **change) -> Tensor:
    out = torch.full((a[0].shape[0], b[0].shape[0] + pad), torch.nan, dtype=dtype)[:, : b[0].shape[0]]
    given = {"a": a[0], "b": b[0], "a_format": a_format, "a_scales": a[1], "b_scales": b[1], "bias": bias, "out": out}
    given |= {"added": None, "room": None}
    module().fp8_product(**given | change, stream=0)
    return out


def assert_right(
    m: int, n: int, k: int, blocks=(0, 0), format: str = "e4m3", dtype=torch.float32, bias: bool = False, pad: int = 0
) -> Tensor:  # fmt: skip
    a, b = pair(m, k, format, blocks[0], 1), pair(n, k, "e4m3", blocks[1], 2)
    shift = randn(n).to(dtype) if bias else None
    results = []
    for wide in (torch.float64, torch.float32):
        left, right = values(*a, format, blocks[0], wide), values(*b, "e4m3", blocks[1], wide)
        results.append(torch.nn.functional.linear(left, right, None if shift is None else shift.to(wide)))
    oracle, plain = results
    found = product(a, b, format, dtype, shift, pad)
    assert_law(found, plain.to(dtype), oracle, OUTPUT, f"{m} x {n} x {k} {blocks} {format} {dtype}")
    return found


# Less than a tile, whole tiles, more than one in each direction; k of less than a step, of more than the ring holds.
@pytest.mark.parametrize("m, n, k", [(5, 3, 16), (128, 128, 128), (260, 130, 144), (131, 40, 784), (256, 128, 640)])
@pytest.mark.parametrize("blocks", [(0, 0), (1, 128), (1, 1)], ids=str)
def test_products_of_every_size(native, blocks, m: int, n: int, k: int):
    for i, order in enumerate(SCHEDULES):
        native.set_schedule(order, 7)
        format, dtype = tuple(FORMATS)[i % 2], (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        assert_right(m, n, k, blocks, format, dtype, bias=i > 1)


@pytest.mark.parametrize("blocks", list(itertools.product(BLOCKS, BLOCKS)), ids=str)
def test_scales_of_every_kind_with_every_other(native, blocks):
    native.set_schedule("random", 3)
    assert_right(140, 150, 272, blocks, "e5m2", bias=True)
    assert_right(1, 1, 400, blocks)  # one line is a block of any kind


def test_results_whose_rows_begin_anywhere(native):
    native.set_schedule("round_robin", 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = [assert_right(67, 140, 80, (1, 128), dtype=dtype, pad=pad) for pad in (0, 1, 3, 8)]
        assert all(torch.equal(other, found[0]) for other in found[1:])


def test_equal_bits_under_every_schedule_when_blocks_take_several_tiles(native):
    """Three multiprocessors hold one cluster: it takes all tiles."""
    for blocks in ((0, 0), (1, 1)):
        found = []
        for order in SCHEDULES:
            native.set_schedule(order, 5)
            found.append(assert_right(260, 140, 272, blocks, dtype=torch.bfloat16))
        assert all(torch.equal(other, found[0]) for other in found[1:])


# Four parts of one tile, the last of less; two of two, of rows that no vector fits; none of three.
@pytest.mark.parametrize("m, n, k, parts", [(40, 72, 4240, 4), (60, 131, 2064, 2), (300, 257, 2064, 0)])
def test_parts_of_a_deep_k(native, many_multiprocessors, m: int, n: int, k: int, parts: int):
    """In equal bits under every schedule; a bias, or what a buffer holds, is added once."""
    a, b, bias, held = pair(m, k, "e5m2", 1, 1), pair(n, k, "e4m3", 1, 2), randn(n), randn(m, n)
    exact = values(*a, "e5m2", 1, torch.float64) @ values(*b, "e4m3", 1, torch.float64).T
    found = []
    for order in SCHEDULES:
        native.set_schedule(order, 7)
        room, buffer = torch.full((4 * 128 * 256,), torch.nan), held.clone()
        product(a, b, "e5m2", added=buffer, out=buffer, room=room)
        assert room.isfinite().sum() == parts * m * n
        found.append((product(a, b, "e5m2", torch.float16, bias=bias, room=room), buffer))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    narrow, wide = found[0]
    for ours, oracle in ((narrow, exact + bias), (wide, exact + held)):
        assert_law(ours, oracle.to(ours.dtype), oracle, OUTPUT, f"{m} x {n} x {k} {ours.dtype}")


def test_nan_reaches_its_row_or_column_alone(native):
    native.set_schedule("random", 9)
    x, w = randn(20, 140), randn(30, 140)
    x[3, 5], w[7, 139] = torch.inf, torch.nan
    for blocks in ((0, 0), (1, 128), (1, 1)):
        found = product(quantise(x, "e4m3", blocks[0]), quantise(w, "e4m3", blocks[1]))
        expected = torch.zeros(20, 30, dtype=torch.bool)
        expected[3], expected[:, 7] = True, True
        assert torch.equal(found.isnan(), expected)


def test_products_are_added_to_a_buffer(native):
    """In float32, in the bits of the product and one addition; rows of the buffer begin anywhere."""
    for i, (m, n, k) in enumerate([(5, 3, 16), (260, 130, 144), (131, 40, 784), (64, 128, 256)]):
        native.set_schedule(SCHEDULES[i], 11)
        pad = (0, 1, 3, 4)[i]
        a, b = pair(m, k, "e5m2", 1, 1), pair(n, k, "e4m3", 1, 2)
        whole = randn(m, n + pad)
        buffer, rest = whole[:, :n], whole[:, n:].clone()
        expected = buffer + product(a, b, "e5m2")
        product(a, b, "e5m2", added=buffer, out=buffer)
        assert torch.equal(buffer, expected), f"{m} x {n} x {k}: not the sum"
        assert torch.equal(whole[:, n:], rest)


def test_gradients_of_weights_go_into_their_buffers(native):
    """Twice, beside none; of no tokens, too."""
    for scaling, tokens in (("tensor", 70), ("block", 140), ("block", 0)):
        x, w = randn(tokens, 48).bfloat16(), [torch.nn.Parameter(randn(72, 48).bfloat16()) for _ in range(2)]
        w[0].main_grad = torch.full((72, 48), 0.5)
        wide = torch.nn.Parameter(w[1].detach().float())  # whose gradient is not rounded
        for weight in (w[0], w[0], wide):
            native.set_schedule("random", 3)
            with llmengine.backend("cuda_sim"):
                functional.fp8_linear(x, weight, scaling=scaling).float().square().sum().backward()
        assert w[0].grad is None and wide.grad is not None
        assert torch.equal(w[0].main_grad, 0.5 + wide.grad + wide.grad)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"a_scales": None}, "a_scales is required but None was given"),
        ({"b_scales": None}, "b_scales is required but None was given"),
        ({"a_scales": torch.ones(2, 3)}, r"a_scales has shape \(2, 3\); expected \(1, 1\), \(2, 20\) or \(2, 1\)"),
        ({"b_scales": torch.ones(2, 1).double()}, "b_scales has dtype float64; allowed: float32"),
        ({"a_format": "e3m4"}, "a_format is 'e3m4'; allowed: 'e4m3', 'e5m2'"),
        ({"a": torch.zeros(20, 150, dtype=torch.uint8)}, "a has 150 of k; allowed: multiples of 16"),
        ({"a": torch.zeros(20, 160)}, "a has dtype float32; allowed: uint8"),
        ({"a": torch.zeros(20 * 160 + 8, dtype=torch.uint8)[8:].view(20, 160)}, "a has data at an odd address"),
        ({"b": torch.zeros(30, 168, dtype=torch.uint8)[:, :160]}, "b has dimension 0 has a stride of 168 bytes"),
        ({"b": torch.zeros(30, 144, dtype=torch.uint8)}, r"b has shape \(30, 144\); expected \(30, 160\)"),
        ({"added": torch.zeros(20, 30).bfloat16()}, "added has dtype bfloat16; allowed: float32"),
        ({"added": torch.zeros(30, 20)}, r"added has shape \(30, 20\); expected \(20, 30\)"),
        ({"added": torch.zeros(20, 60)[:, ::2]}, "added must have last stride 1"),
        ({"room": torch.zeros(8).half()}, "room has dtype float16; allowed: float32"),
        ({"bias": torch.zeros(20)}, r"bias has shape \(20,\); expected \(30,\)"),
        ({"out": torch.zeros(30, 20)}, r"out has shape \(30, 20\); expected \(20, 30\)"),
    ],
)
def test_errors_name_argument_given_and_allowed(native, change, said: str):
    a, b = quantise(randn(20, 160), "e4m3", 1), quantise(randn(30, 160), "e4m3", 128)
    with pytest.raises(ValueError, match=f"^fp8_product: {said}"):
        product(a, b, **change)


def test_errors_of_the_quantiser(native):
    rows, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(1, 4)
    given = dict.fromkeys(("maxima", "columns", "column_scales")) | {"x": torch.ones(4, 20), "format": "e4m3"}
    given |= {"block": 1, "rows": rows, "row_scales": scales}
    for change, said in [
        ({"format": "e2m1"}, "format is 'e2m1'; allowed: 'e4m3', 'e5m2'"),
        ({"block": 64}, "block is 64; allowed: 0, 1, 128"),
        ({"block": 0, "row_scales": torch.ones(1, 1)}, "maxima is required but None was given"),
        ({"row_scales": None}, "row_scales are wanted with rows, and only with them"),
        ({"row_scales": torch.ones(4, 1)}, r"row_scales has shape \(4, 1\); expected \(1, 4\)"),
        ({"rows": torch.zeros(4, 32)}, "rows has dtype float32; allowed: uint8"),
        ({"rows": torch.zeros(4, 20, dtype=torch.uint8)}, r"rows has shape \(4, 20\); expected \(4, 32\)"),
        ({"x": torch.ones(4, 20).long()}, "x has dtype int64; allowed: float32"),
    ]:
        with pytest.raises(ValueError, match=f"^fp8_quantise: {said}"):
            native.fp8_quantise(**given | change, stream=0)


def test_the_operator_is_refused_on_other_gpus(native, monkeypatch):
    monkeypatch.setattr(cuda_sim.NATIVE, "capability", lambda on: (8, 0))
    said = "refuses: products of 8-bit floats are for compute capability 9.0, the device has 8.0"
    with llmengine.backend("cuda_sim"), pytest.raises(RuntimeError, match=said):
        functional.fp8_linear(torch.ones(3, 4), torch.ones(5, 4))


# ---- one line broken -------------------------------------------------------------------------------------------------

QUANTISE, PRODUCT = "fp8_quantise_sm90a", "fp8_product_sm90a"
BREAKS: dict[str, Break] = {
    "no wait for a stage": (
        PRODUCT, f"{PRODUCT}.cu", "ptx::mbarrier_wait(&shared.full[s], turn.parity);", "",
        "product reads .* what a bulk copy writes .* with no mbarrier_wait|reads shared memory that no thread",
    ),
    "products read while under way": (
        PRODUCT, f"{PRODUCT}.cu", "ptx::wgmma_wait<0>(products);", "",
        "of a product .* with no wgmma_wait between|what a product of .* with no wgmma_wait",
    ),
    "stage given back too soon": (
        PRODUCT, f"{PRODUCT}.cu",
        "ptx::wgmma_wait<0>(products);\n      gemm_sm90a::give_back(&shared.empty[s]);",
        "gemm_sm90a::give_back(&shared.empty[s]);\n      ptx::wgmma_wait<0>(products);",
        "its copy writes .* what a product of .* with no|where its mbarrier's phase|deadlock",
    ),
    "no barrier for scales": (
        PRODUCT, f"{PRODUCT}.cu", "ptx::barrier_sync(static_cast<int>(threadIdx.x) / 128, 128);", "",
        "races|reads shared memory that no thread|with no barrier between",
    ),
    "one row of scales": (
        PRODUCT, f"{PRODUCT}.cu", "shared.scales[group][s % 2]", "shared.scales[group][0]", "races|with no barrier",
    ),
    "scales of the other warpgroup": (
        PRODUCT, f"{PRODUCT}.cu", "shared.scales[group][s % 2]", "shared.scales[0][s % 2]",
        "races|with no barrier|no thread",
    ),
    "scales of the wrong step": (
        PRODUCT, f"{PRODUCT}.cu", "of_rows[1][step * p.a.of_k]", "of_rows[1][item.from * p.a.of_k]", "exceeds",
    ),
    "scales past the last line": (
        PRODUCT, f"{PRODUCT}.cu", "(line < lines ? line : lines - 1)", "line", "past the end|outside|belongs to no",
    ),
    "rows' halves change places": (PRODUCT, f"{PRODUCT}.cu", "of_a[i / 2]", "of_a[1 - i / 2]", "exceeds"),
    "columns change places": (PRODUCT, f"{PRODUCT}.cu", "of_b(j, i % 2)", "of_b(j, 1 - i % 2)", "exceeds"),
    "half of a step's k": (
        PRODUCT, "gemm_sm90a.cuh", "(step - product * tiles.steps_of_product) * depth",
        "(step - product * tiles.steps_of_product) * kDepth", "exceeds",
    ),
    "sums begin with what was there": (
        PRODUCT, f"{PRODUCT}.cu", "shared.b[s], false);", "shared.b[s], step > item.from);", "exceeds",
    ),
    "parts in one place": (
        PRODUCT, f"{PRODUCT}.cu", "column + v, item.part, x[0]", "column + v, 0, x[0]", "not the sum|races",
    ),
    "what other columns hold is added": (
        PRODUCT, f"{PRODUCT}.cu", "p.to.load(row + r, column + v)", "p.to.load(row + r, v)", "not the sum|exceeds",
    ),
    "no barrier before the transpose": (
        QUANTISE, f"{QUANTISE}.cu", "  __syncthreads();\n  for (int i =", "  for (int i =",
        "races|reads shared memory that no thread",
    ),
    "no barrier before columns' largest": (
        QUANTISE, f"{QUANTISE}.cu", "  __syncthreads();\n  if (t < kTile)", "  if (t < kTile)",
        "races|reads shared memory that no thread",
    ),
    "no barrier behind columns' largest": (
        QUANTISE, f"{QUANTISE}.cu", "    shared.of_columns[t] = of_column;\n  }\n  __syncthreads();",
        "    shared.of_columns[t] = of_column;\n  }", "races|reads shared memory that no thread",
    ),
    "no barrier for a tile's largest": (
        QUANTISE, f"{QUANTISE}.cu", "= largest[0];\n  __syncthreads();", "= largest[0];",
        "races|reads shared memory that no thread",
    ),
    "chunks do not change places": (
        QUANTISE, f"{QUANTISE}.cu", "[chunk ^ column / kSide % 8]", "[chunk]", "e4m3",
    ),
    "an infinity counts": (
        QUANTISE, f"{QUANTISE}.cu", "return magnitude <= FLT_MAX ? magnitude : 0.0f;", "return magnitude;", "e4m3",
    ),
    "an infinity is the largest": (
        QUANTISE, f"{QUANTISE}.cu", "fabsf(x) <= FLT_MAX ? x * inverse : NAN", "x * inverse", "e4m3",
    ),
    "bytes past the last line": (
        QUANTISE, f"{QUANTISE}.cu", "line >= p.transposed.stride) continue;", "false) continue;",
        "past the end|outside|belongs to no|e4m3",
    ),
}  # fmt: skip


def attempt() -> None:
    module().set_schedule("random", 4)
    x = randn(150, 200)
    x[3, 4] = torch.inf
    for block in BLOCKS:
        assert_reference(x, "e4m3", block)
    for blocks in ((0, 0), (1, 128), (1, 1)):
        assert_right(140, 140, 656, blocks)
    a, b, buffer = pair(40, 32, "e4m3", 0, 1), pair(140, 32, "e4m3", 0, 2), randn(40, 140)
    expected = buffer + product(a, b)
    assert torch.equal(product(a, b, added=buffer), expected), "not the sum"
    a, b, room = pair(4, 2064, "e4m3", 0, 1), pair(9, 2064, "e4m3", 0, 2), torch.full((2 * 4 * 9,), torch.nan)
    module().set_multiprocessors(count=8)
    in_parts = product(a, b, room=room)
    module().set_multiprocessors(count=3)
    assert torch.allclose(in_parts, product(a, b), rtol=1e-5), "not the sum"


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    attempt()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 6 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
