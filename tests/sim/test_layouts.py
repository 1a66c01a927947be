"""Single instructions of csrc/cuda/ptx/ (layouts.cu): who holds which element, as the PTX ISA document has it, built
here from its formulas. In the simulator, under every schedule; and on a GPU, by the same tests, where there is one.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmengine.testing import simulator
from llmengine.testing.simulator import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4

Words = np.ndarray  # (blocks, words of a block), uint32
Run = Callable[..., Words]


@functools.cache
def library(device: str, folder: Path) -> ctypes.CDLL:
    if device == "simulator":
        path = simulator.build("simulator_layouts") / "libsimulator_layouts.so"
    else:
        path = folder / "liblayouts.so"
        options = ["-std=c++20", "--expt-relaxed-constexpr", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
        source = ROOT / "tests/sim/layouts.cu"
        subprocess.run(["nvcc", *options, f"-I{ROOT / 'csrc'}", source, "-o", path], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.run_layout.restype = ctypes.c_char_p
    return loaded


DEVICES = [pytest.param(("simulator", order), id=order) for order in SCHEDULES]
if torch.cuda.is_available() and shutil.which("nvcc"):
    DEVICES.append(pytest.param(("gpu", ""), id="gpu"))


@pytest.fixture(params=DEVICES)
def run(request, tmp_path_factory) -> Run:
    """run(name, words of every block, words that a block gives, times=1): what the blocks give."""
    device, order = request.param
    native = library(device, tmp_path_factory.getbasetemp())
    if device == "simulator":
        native.set_schedule(order.encode(), ctypes.c_uint64(5))

    def call(name: str, given: Words, each: int, times: int = 1) -> Words:
        place = "cpu" if device == "simulator" else "cuda"
        words = torch.from_numpy(np.ascontiguousarray(given, np.uint32).view(np.int32)).to(place)
        out = torch.full((len(given), each), -1, dtype=torch.int32, device=place)
        arrays = [ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(words.numel()),
                  ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel())]  # fmt: skip
        problem = native.run_layout(name.encode(), *arrays, len(given), times)
        if problem:
            raise RuntimeError(problem.decode())
        return out.cpu().numpy().view(np.uint32)

    return call


def only_simulated(run: Run, request) -> None:
    if "gpu" in request.node.callspec.id:
        pytest.skip("not specified for hardware")


def words_of(halves: np.ndarray) -> Words:
    """Pairs of 16-bit elements along the last dimension as words, the first in the lower half."""
    return np.ascontiguousarray(halves, np.uint16).view(np.uint32)


# ---- rows ------------------------------------------------------------------------------------------------------------


def lane_elements(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    """The two elements that each lane has of an 8 x 8 matrix: (32, 2)."""
    if transposed:
        matrix = matrix.T
    return np.stack([matrix[GROUP, 2 * IN_GROUP], matrix[GROUP, 2 * IN_GROUP + 1]], 1)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded_from_the_rows_that_lanes_name(run, count: int, transposed: bool):
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8) * 251  # every element another
    places = np.random.default_rng(count).permutation(32)
    found = run(f"load_x{count}{'_transposed' * transposed}", [[*places, *words_of(rows).ravel()]], 32 * count)
    for m in range(count):
        expected = lane_elements(rows[places[8 * m : 8 * m + 8]], transposed)
        np.testing.assert_array_equal(found.reshape(32, count)[:, m], words_of(expected).ravel())


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [2, 4])
def test_matrices_are_stored_to_the_rows_that_lanes_name(run, count: int, transposed: bool):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("stmatrix needs sm_90")
    matrices = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8) + 1
    places = np.random.default_rng(count).permutation(32)
    registers = np.stack([words_of(lane_elements(m, transposed)).ravel() for m in matrices], 1)
    found = run(f"store_x{count}{'_transposed' * transposed}", [[*places, *registers.ravel()]], 128)
    expected = np.zeros((32, 8), np.uint16)
    expected[places[: 8 * count]] = matrices.reshape(-1, 8)
    np.testing.assert_array_equal(found.reshape(32, 4), words_of(expected))


# ---- products --------------------------------------------------------------------------------------------------------


class Shape:
    """Where the elements of a 16 x 8 x k product's fragments lie: element i of a lane, as the document numbers them."""

    def __init__(self, kind: str):
        self.kind, self.k = kind, 16 if kind.startswith("16x8x16") else 8
        self.packed = not kind.endswith("tf32")
        i = np.arange({("16x8x16", True): 8, ("16x8x8", True): 4}.get((kind.split("_")[0], self.packed), 4))[:, None]
        j = np.arange(len(i) // 2)[:, None]
        if not self.packed:
            self.a = np.where(i % 2 == 0, GROUP, GROUP + 8), np.where(i < 2, IN_GROUP, IN_GROUP + 4)
            self.b = np.where(j == 0, IN_GROUP, IN_GROUP + 4), np.broadcast_to(GROUP, (2, 32))
        else:
            self.a = np.where(i // 2 % 2 == 0, GROUP, GROUP + 8), IN_GROUP * 2 + i % 2 + np.where(i < 4, 0, 8)
            self.b = IN_GROUP * 2 + j % 2 + np.where(j < 2, 0, 8), np.broadcast_to(GROUP, (len(j), 32))
        i = np.arange(4)[:, None]
        self.d = np.where(i < 2, GROUP, GROUP + 8), IN_GROUP * 2 + i % 2

    def bits(self, x: np.ndarray) -> np.ndarray:
        """As elements of this kind; they must be exact."""
        if not self.packed:
            return np.asarray(x, np.float32).view(np.uint32)
        dtype = torch.bfloat16 if self.kind.endswith("bf16") else torch.float16
        return torch.from_numpy(np.asarray(x, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)

    def registers(self, matrix: np.ndarray, where: tuple[np.ndarray, np.ndarray], room: int) -> Words:
        """(32, room): the fragment of each lane."""
        elements = self.bits(matrix[where]).T  # (32, elements)
        words = words_of(elements) if self.packed else elements
        return np.pad(words, ((0, 0), (0, room - words.shape[1])))

    def given(self, a: np.ndarray, b: np.ndarray, d: np.ndarray) -> Words:
        d_words = np.asarray(d, np.float32)[self.d].T.view(np.uint32)
        return np.hstack([self.registers(a, self.a, 4), self.registers(b, self.b, 2), d_words]).ravel()

    def product(self, run: Run, a, b, d) -> np.ndarray:
        """d + a b of every block: (blocks, 16, 8)."""
        found = run(self.kind, [self.given(*block) for block in zip(a, b, d, strict=True)], 128)
        result = np.full((len(a), 16, 8), np.nan, np.float32)
        result[:, self.d[0], self.d[1]] = found.reshape(-1, 32, 4).view(np.float32).transpose(0, 2, 1)
        return result


KINDS = pytest.mark.parametrize("kind", ["16x8x16_bf16", "16x8x16_f16", "16x8x8_bf16", "16x8x8_f16", "16x8x8_tf32"])


@KINDS
def test_every_element_of_a_product_is_where_the_document_has_it(run, kind: str):
    """One block for each element of a, alone with a one, beside a b of different numbers; then the same for b and d."""
    shape = Shape(kind)
    k = shape.k
    ones_of_a, ones_of_b = np.eye(16 * k).reshape(-1, 16, k), np.eye(k * 8).reshape(-1, k, 8)
    numbers_of_a, numbers_of_b = np.arange(1, 1 + 16 * k).reshape(16, k), np.arange(1, 1 + k * 8).reshape(k, 8)
    zeros = np.zeros((len(ones_of_a), 16, 8))
    found = shape.product(run, ones_of_a, np.broadcast_to(numbers_of_b, (len(ones_of_a), k, 8)), zeros)
    np.testing.assert_array_equal(found, ones_of_a @ numbers_of_b)
    found = shape.product(run, np.broadcast_to(numbers_of_a, (len(ones_of_b), 16, k)), ones_of_b, zeros[: 8 * k])
    np.testing.assert_array_equal(found, numbers_of_a @ ones_of_b)
    d = np.arange(128).reshape(1, 16, 8) + 0.5
    np.testing.assert_array_equal(shape.product(run, ones_of_a[:1] * 0, ones_of_b[:1], d), d)


@KINDS
def test_a_product_of_random_numbers(run, kind: str):
    """Within a few units in the last place of the largest term, whatever the order of the sum."""
    shape, rng = Shape(kind), np.random.default_rng(3)
    a, b = (rng.integers(-64, 64, (8, *size)) / 16 for size in ((16, shape.k), (shape.k, 8)))
    d = rng.standard_normal((8, 16, 8)).astype(np.float32)
    exact = d.astype(np.float64) + a @ b
    terms = np.abs(d) + np.abs(a) @ np.abs(b)
    assert (np.abs(shape.product(run, a, b, d) - exact) <= terms * 2.0**-22).all()


@KINDS
def test_infinity_and_nan_reach_their_row_or_column_alone(run, kind: str):
    shape = Shape(kind)
    a, b, d = np.ones((1, 16, shape.k)), np.ones((1, shape.k, 8)), np.zeros((1, 16, 8))
    a[0, 3, 5], b[0, 2, 6] = np.inf, np.nan
    found = shape.product(run, a, b, d)[0]
    assert np.isnan(found[:, 6]).all()
    others = np.delete(found, 6, axis=1)
    assert np.isinf(others[3]).all() and (np.delete(others, 3, axis=0) == shape.k).all()


@KINDS
def test_small_terms_beside_large_ones_are_cut(run, kind: str, request):
    only_simulated(run, request)
    shape = Shape(kind)
    a, b = np.zeros((3, 16, shape.k)), np.ones((3, shape.k, 8))
    d = np.stack([np.full((16, 8), x) for x in (1.0, -1.0, 2.0**14)])
    a[0, :, 0], a[1, :, 0] = 0.75 * 2.0**-12, -0.75 * 2.0**-12
    b[:2] = 2.0**-11  # 3/4 of the last place of 1: to nearest it would count
    a[2, :, :2] = [-(2.0**14), 2.0**-12]  # below 26 bits of the largest: lost, though all that remains
    found = shape.product(run, a, b, d)
    assert (found == np.array([1.0, -1.0, 0.0])[:, None, None]).all()


def test_tf32_is_the_nearest_and_its_lower_bits_count_for_nothing(run):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(28), [0.0, 1 + 2.0**-11, -1 - 2.0**-11, np.inf]]).astype(np.float32)
    found = run("tf32_of", x.view(np.uint32)[None], 32)[0]
    unit = 2.0 ** (np.floor(np.log2(np.abs(np.where((x == 0) | np.isinf(x), 1, x)))) - 10)
    expected = np.sign(x) * np.floor(np.abs(x) / unit + 0.5) * unit  # ties away from zero
    np.testing.assert_array_equal((found & 0xFFFFE000).view(np.float32), expected.astype(np.float32))

    shape = Shape("16x8x8_tf32")
    a, b = rng.integers(-8, 8, (16, 8)), rng.integers(-8, 8, (8, 8))
    given = shape.given(a, b, np.zeros((16, 8))).reshape(32, 10)
    given[:, :6] |= rng.integers(0, 0x2000, (32, 6), dtype=np.uint32)
    found = run(shape.kind, given.reshape(1, -1), 128).reshape(32, 4).view(np.float32)
    np.testing.assert_array_equal(found, (a @ b)[shape.d].T)


def test_the_lower_bits_of_tf32_are_not_zeros(run, request):
    only_simulated(run, request)
    found = run("tf32_of", np.arange(1, 33, dtype=np.float32).view(np.uint32)[None], 32)
    assert (found & 0x1FFF).any()


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_fill_up_with_zeros(run, size: int):
    rng = np.random.default_rng(size)
    counts = np.concatenate([[0, size], rng.integers(0, size + 1, 30)])
    rows = rng.integers(1, 256, (32, 16), dtype=np.uint8)
    found = run(f"copy_{size}", [[*counts, *rows.view(np.uint32).ravel()]], 128)
    expected = np.tile(np.array([1, 2, 3, 4], np.uint32).view(np.uint8), (32, 1))
    expected[:, :size] = np.where(np.arange(size) < counts[:, None], rows[:, :size], 0)
    np.testing.assert_array_equal(found.reshape(32, 4), expected.view(np.uint32))


def test_bulk_copies_bring_their_rows(run):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies need sm_90")
    rows = np.random.default_rng(2).integers(0, 2**32, (3, 128), dtype=np.uint32)
    np.testing.assert_array_equal(run("bulk_copy", rows, 128), rows)


# ---- together --------------------------------------------------------------------------------------------------------


def test_a_product_fed_by_copies_and_matrix_loads(run):
    rng, shape = np.random.default_rng(9), Shape("16x8x16_bf16")
    a, b = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (16, 8))
    given = np.concatenate([words_of(shape.bits(x)).ravel() for x in (a, b.T, b)])
    found = run("whole_product", given[None], 256).view(np.float32).reshape(2, 16, 8)
    np.testing.assert_array_equal(found, np.stack([a @ b, a @ b]))


# ---- warps and atomics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 5, 8, 19, 31])
def test_lanes_get_what_the_shuffles_name(run, number: int):
    """Where that is beyond the segment, their own; but a butterfly reaches segments before."""
    words = np.random.default_rng(number).integers(0, 2**32, 32, dtype=np.uint32)
    found = run("shuffles", np.array([[*words, number]]), 256).reshape(32, 4, 2)
    for i, width in enumerate((32, 8)):
        first = LANES // width * width
        for kind, source in enumerate((first + number % width, LANES ^ number, LANES - number, LANES + number)):
            inside = ((source >= first) | (kind == 1)) & (source < first + width)
            np.testing.assert_array_equal(found[:, kind, i], words[np.where(inside, source, LANES)])


@pytest.mark.parametrize("yes", [0, 1, 0x80, 0x7FFFFFFF, 0xFFFF0000, 0xFFFFFFFF], ids=hex)
def test_votes_are_those_of_the_lanes_that_are_asked(run, yes: int):
    found = run("votes", (yes >> LANES & 1)[None] * 6, 192).reshape(32, 6)
    halves = [(yes & mask, mask) for mask in (0xFFFF, 0xFFFF0000)]
    for lane in range(32):
        for answers, (ballot, mask) in ((found[lane, :3], (yes, 0xFFFFFFFF)), (found[lane, 3:], halves[lane // 16])):
            assert answers.tolist() == [ballot != 0, ballot == mask, ballot]


def test_atomics_change_and_give_what_was_there(run):
    words = np.random.default_rng(1).integers(1, 2**32, 32, dtype=np.uint32)
    found = run("atomics", words[None], 138)[0]
    for end, taken in ((found[:5], found[10:74]), (found[5:10], found[74:])):
        exchanged, counted = taken.reshape(32, 2).T
        assert end[:3].tolist() == [words.sum(dtype=np.uint32), words.max(), words.min()]
        assert sorted([*exchanged, end[3]]) == sorted([0, *words]), "each word is there for one lane that comes next"
        assert sorted(counted) == list(range(32)) and end[4] == 32
