"""What sm_90 brought, single instructions of csrc/cuda/ptx/ (hopper_layouts.cu): where a box's elements lie in shared
memory, who holds what of a warpgroup's product, what blocks of a cluster see of each other. All is built here from the
formulas of the PTX ISA document. In the simulator, under every schedule; and on a GPU, where there is one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
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
Words = np.ndarray  # uint32
Run = Callable[..., Words]
SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes of a row of each swizzle, by its number
SWIZZLES = pytest.mark.parametrize("swizzle", SPANS, ids=["plain", "32B", "64B", "128B"])


@functools.cache
def library(device: str, folder: Path) -> ctypes.CDLL:
    if device == "simulator":
        path = simulator.build("simulator_hopper_layouts") / "libsimulator_hopper_layouts.so"
    else:
        path = folder / "libhopper.so"
        options = ["-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90a", "-shared", "-Xcompiler=-fPIC"]
        source = ROOT / "tests/sim/hopper_layouts.cu"
        subprocess.run(["nvcc", *options, f"-I{ROOT / 'csrc'}", source, "-o", path], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.run_layout.restype = ctypes.c_char_p
    return loaded


DEVICES = [pytest.param(("simulator", order), id=order) for order in SCHEDULES]
if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and shutil.which("nvcc"):
    DEVICES.append(pytest.param(("gpu", ""), id="gpu"))


@pytest.fixture(params=DEVICES)
def run(request, tmp_path_factory) -> Run:
    """run(name, words, words that come out, numbers): what comes out, where nothing is written `fill`."""
    device, order = request.param
    native = library(device, tmp_path_factory.getbasetemp())
    if device == "simulator":
        native.set_schedule(order.encode(), ctypes.c_uint64(5))

    def call(name: str, given: Words, size: int, numbers=(), fill: int = -1) -> Words:
        place = "cpu" if device == "simulator" else "cuda"
        words = torch.from_numpy(np.ascontiguousarray(given, np.uint32).view(np.int32)).to(place)
        out = torch.full((size,), fill, dtype=torch.int32, device=place)
        arrays = [ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(words.numel()),
                  ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel())]  # fmt: skip
        problem = native.run_layout(name.encode(), *arrays, (ctypes.c_int * 32)(*numbers))
        if problem:
            raise RuntimeError(problem.decode())
        return out.cpu().numpy().view(np.uint32)

    return call


def swizzled(offset: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the byte goes that would lie at `offset`: the number of its 16-byte chunk XOR that of its 128 bytes."""
    chunks = max(SPANS[swizzle] // 16, 1)
    return offset ^ (offset // 128 % chunks * 16)


# ---- boxes -----------------------------------------------------------------------------------------------------------

DTYPES = {"float32": (0, 4), "bfloat16": (1, 2)}  # the number that C++ has for it, bytes


def box_numbers(dtype: str, swizzle: int, sizes, box, steps, place) -> list[int]:
    """As BoxNumber of hopper_layouts.cu has them; sizes, box and steps from the outermost dimension on."""
    padded = [list(x) + [0] * (5 - len(x)) for x in (sizes, box, steps, place)]
    return [len(sizes), DTYPES[dtype][0], swizzle, *itertools.chain(*padded)]


def box_indices(sizes, box, steps, place):
    """Of every element of a box, dense: its index in the tensor, flat, and whether it lies in it."""
    counts = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    grid = np.meshgrid(*[np.arange(c) * s for c, s in zip(counts, steps, strict=True)], indexing="ij")
    at = [g + p for g, p in zip(grid, reversed(place), strict=True)]
    inside = np.all([(a >= 0) & (a < s) for a, s in zip(at, sizes, strict=True)], axis=0).ravel()
    clipped = [np.clip(a, 0, s - 1) for a, s in zip(at, sizes, strict=True)]
    return np.ravel_multi_index(clipped, sizes).ravel(), inside


# dtype, tensor, box, steps, place of the box (fastest dimension first): inside, over each edge, before the beginning
BOXES = [
    ("float32", (40,), (16,), (1,), (8,)),
    ("float32", (40,), (16,), (1,), (-4,)),
    ("float32", (20, 32), (8, 8), (1, 1), (16, 4)),
    ("float32", (20, 32), (8, 8), (1, 1), (28, 15)),
    ("float32", (20, 36), (9, 8), (1, 1), (33, -3)),
    ("float32", (20, 36), (8, 8), (1, 1), (-3, 2)),
    ("bfloat16", (64, 40), (16, 16), (1, 1), (27, 60)),
    ("bfloat16", (64, 40), (16, 16), (3, 1), (3, 10)),
    ("float32", (6, 10, 16), (3, 4, 8), (1, 1, 1), (12, 8, 4)),
    ("float32", (6, 10, 16), (3, 8, 8), (2, 2, 1), (4, 3, -1)),
    ("bfloat16", (3, 5, 7, 24), (2, 3, 4, 16), (1, 1, 1, 1), (10, 5, -1, 2)),
    ("float32", (2, 3, 4, 5, 8), (2, 2, 2, 3, 4), (1, 1, 1, 1, 1), (4, 3, 3, 1, 0)),
]


def swizzled_box(dtype: str, swizzle: int, box):
    """The box with rows as long as the swizzle wants them."""
    return (*box[:-1], SPANS[swizzle] // DTYPES[dtype][1]) if swizzle else box


def image(elements: np.ndarray, swizzle: int) -> np.ndarray:
    """Elements, dense, as the bytes of shared memory."""
    data = np.ascontiguousarray(elements).view(np.uint8).ravel()
    found = np.empty_like(data)
    found[swizzled(np.arange(len(data)), swizzle)] = data
    return found


@SWIZZLES
@pytest.mark.parametrize("dtype, sizes, box, steps, place", BOXES, ids=str)
def test_a_box_lies_in_shared_memory_as_its_swizzle_has_it(run, swizzle, dtype, sizes, box, steps, place):
    box = swizzled_box(dtype, swizzle, box)
    kind = np.uint32 if DTYPES[dtype][1] == 4 else np.uint16
    tensor = np.random.default_rng(3).integers(1, 2**15, sizes).astype(kind)
    indices, inside = box_indices(sizes, box, steps, place)
    expected = image(np.where(inside, tensor.ravel()[indices], 0).astype(kind), swizzle).view(np.uint32)
    given = tensor.ravel().view(np.uint32)
    found = run("load_box", given, len(expected), box_numbers(dtype, swizzle, sizes, box, steps, place))
    np.testing.assert_array_equal(found, expected)


@SWIZZLES
def test_a_box_of_a_head_whose_tokens_lie_between_those_of_others(run, swizzle):
    """A step from head to head is smaller than one from token to token."""
    sizes, steps, place = (2, 3, 20, 128), (1, 1, 1, 1), (64, 15, 2, 1)
    box = swizzled_box("bfloat16", swizzle, (1, 1, 8, 16))
    tensor = np.random.default_rng(3).integers(1, 2**15, sizes).astype(np.uint16)
    indices, inside = box_indices(sizes, box, steps, place)
    expected = image(np.where(inside, tensor.ravel()[indices], 0).astype(np.uint16), swizzle).view(np.uint32)
    given = np.ascontiguousarray(tensor.swapaxes(1, 2)).ravel().view(np.uint32)
    numbers = [*box_numbers("bfloat16", swizzle, sizes, box, steps, place), 1]
    np.testing.assert_array_equal(run("load_box", given, len(expected), numbers), expected)


@SWIZZLES
@pytest.mark.parametrize("dtype, sizes, box, steps, place", BOXES, ids=str)
def test_a_box_is_stored_where_it_lies_in_the_tensor(run, swizzle, dtype, sizes, box, steps, place):
    box = swizzled_box(dtype, swizzle, box)
    kind = np.uint32 if DTYPES[dtype][1] == 4 else np.uint16
    indices, inside = box_indices(sizes, box, steps, place)
    elements = np.random.default_rng(4).integers(1, 2**15, len(indices)).astype(kind)
    expected = np.full(np.prod(sizes), -1).astype(kind)
    expected[indices[inside]] = elements[inside]
    given = image(elements, swizzle).view(np.uint32)
    numbers = box_numbers(dtype, swizzle, sizes, box, steps, place)
    found = run("store_box", given, expected.view(np.uint32).size, numbers)
    np.testing.assert_array_equal(found, expected.view(np.uint32))


@SWIZZLES
@pytest.mark.parametrize("dtype, sizes, box, steps, place", [b for b in BOXES if b[0] == "float32"], ids=str)
def test_a_box_is_added_to_what_is_there(run, swizzle, dtype, sizes, box, steps, place):
    box = swizzled_box(dtype, swizzle, box)
    indices, inside = box_indices(sizes, box, steps, place)
    elements = np.random.default_rng(4).integers(1, 2**15, len(indices)).astype(np.float32)
    expected = np.zeros(np.prod(sizes), np.float32)
    expected[indices[inside]] = 2 * elements[inside]
    given = image(elements, swizzle).view(np.uint32)
    found = run("add_box", given, expected.size, box_numbers(dtype, swizzle, sizes, box, steps, place), fill=0)
    np.testing.assert_array_equal(found.view(np.float32), expected)


def test_what_lies_together_is_stored_and_added_in_bulk(run):
    floats = np.random.default_rng(4).standard_normal(200).astype(np.float32)
    bits = floats.view(np.uint32)
    found = run("store_in_bulk", bits, 600)
    np.testing.assert_array_equal(found[:400].view(np.float32), np.concatenate([floats, 2 * floats]))
    np.testing.assert_array_equal(found[400:], bits + bits)  # modulo 2^32


GOOD = {"dtype": "float32", "swizzle": 3, "sizes": (40, 64), "box": (8, 32), "steps": (1, 1), "place": (0, 0)}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"box": (257, 32)}, "the box covers 257 elements of dimension 0; allowed: 1 to 256"),
        ({"box": (0, 32)}, "the box covers 0 elements of dimension 0; allowed: 1 to 256"),
        ({"box": (8, 64)}, "the box has rows of 256 bytes; allowed: the swizzle's 128"),
        ({"box": (8, 16)}, "the box has rows of 64 bytes; allowed: the swizzle's 128"),
        ({"box": (8, 6), "swizzle": 0}, "the box has rows of 24 bytes; allowed: multiples of 16"),
        ({"sizes": (40, 63)}, "dimension 0 has a stride of 252 bytes; allowed: multiples of 16, above 0 and below 2"),
        ({"sizes": (0, 64)}, "dimension 0 has size 0; allowed: 1 to 2"),
        ({"steps": (9, 1)}, "steps of 9 in dimension 0; allowed: 1 to 8"),
        ({"steps": (1, 2)}, "steps of 2 in the last dimension; allowed: 1"),
    ],
    ids=str,
)
def test_a_box_beyond_the_limits_is_an_error_that_names_it(run, change, said):
    with pytest.raises(RuntimeError, match=rf"tensor map of tensor \(.*\): {said}"):
        run("load_box", np.zeros(40 * 64), 8 * 32, box_numbers(**(GOOD | change)))


def test_a_tensor_at_an_odd_address_has_no_map():
    given = np.zeros(40 * 64 + 8, np.uint32)
    place = given.ctypes.data + (-given.ctypes.data % 16) + 4
    arrays = [ctypes.c_void_p(place), ctypes.c_int64(40 * 64), ctypes.c_void_p(place), ctypes.c_int64(8 * 32)]
    numbers = (ctypes.c_int * 32)(*box_numbers(**GOOD))
    problem = library("simulator", Path()).run_layout(b"load_box", *arrays, numbers)
    assert b"data at an odd address; allowed: multiples of 16 bytes" in problem


# ---- products --------------------------------------------------------------------------------------------------------


class Operand:
    """One operand of a warpgroup's product in shared memory: `extent` of m or n, `depth` of k."""

    def __init__(self, kind: str, major: str, extent: int, depth: int, swizzle: int):
        self.bytes = {"tf32": 4, "bf16": 2, "f16": 2}.get(kind, 1)
        self.swizzle, span = swizzle, SPANS[swizzle] or 16
        index, k = np.meshgrid(np.arange(extent), np.arange(depth), indexing="ij")
        row, column = (index, k) if major == "k" else (k, index)
        rows, byte = (extent, column * self.bytes) if major == "k" else (depth, column * self.bytes)
        columns = (depth if major == "k" else extent) * self.bytes
        pattern = 8 * span  # bytes of eight rows
        within = row % 8 * span + byte % span
        # blocks of eight rows and one span: those of a column of them follow one another
        block_rows, block_columns = rows // 8, -(-columns // span)
        offset = within + (row // 8 + byte // span * block_rows) * pattern
        self.offset = swizzled(offset, swizzle)
        self.size = block_rows * block_columns * pattern
        next_rows, next_columns = pattern, block_rows * pattern
        if major == "k":
            self.leading, self.stride = (next_columns if swizzle == 0 else 16), next_rows
            self.advance = next_columns * (2 if swizzle == 0 else 0)  # of steps of 32 bytes of k, beyond one span
        else:
            self.leading, self.stride = (next_rows, next_columns) if swizzle == 0 else (next_columns, next_rows)

    def words(self, bits: np.ndarray) -> Words:
        data = np.full(self.size, 0xFF, np.uint8)  # NaN where nothing lies
        for b in range(self.bytes):
            data[self.offset + b] = bits >> 8 * b & 0xFF
        return data.view(np.uint32)


BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def bits_of(matrix: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tf32":
        return np.asarray(matrix, np.float32).view(np.uint32)
    if kind in BYTES:
        return torch.tensor(np.asarray(matrix)).to(BYTES[kind]).view(torch.uint8).numpy().astype(np.uint32)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.tensor(np.asarray(matrix)).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


LANES = np.arange(128)
ROWS = 16 * (LANES // 32) + LANES % 32 // 4  # g of the document, in the rows of its warp


def d_places(n: int):
    """Row and column of element i of lane l: (128, n / 2) each."""
    i = np.arange(n // 2)
    return ROWS[:, None] + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANES % 4)[:, None] + i % 2


def a_registers(a: np.ndarray, kind: str) -> Words:
    """(128, 4): the fragment of one product."""
    t = (LANES % 4)[:, None]
    if kind == "tf32":
        i = np.arange(4)
        return bits_of(a, kind)[ROWS[:, None] + 8 * (i % 2), t + 4 * (i // 2)]
    if a.shape[1] == 32:
        i = np.arange(16)
        bytes = bits_of(a, kind.split("_")[0])[ROWS[:, None] + 8 * (i // 4 % 2), 4 * t + i % 4 + 16 * (i // 8)]
        return np.ascontiguousarray(bytes.astype(np.uint8)).view(np.uint32)
    i = np.arange(8)
    halves = bits_of(a, kind)[ROWS[:, None] + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)]
    return np.ascontiguousarray(halves.astype(np.uint16)).view(np.uint32)


def multiply(
    run: Run, kind: str, n: int, a_form: str, b_form: str, swizzle: int, a, b, d, add: bool, products=1, behind=0
):  # fmt: skip
    """d (64 x n) after `products` steps of k; a is 64 x k, b k x n; both lie so many bytes beyond where swizzles
    repeat."""
    depth = a.shape[1]
    left_kind, right_kind = kind.split("_") if "_" in kind else (kind, kind)
    left = Operand(left_kind, "k" if a_form == "registers" else a_form, 64, depth, swizzle)
    right = Operand(right_kind, b_form, n, depth, swizzle)
    each = depth // products
    advance = [32 if swizzle else left.advance, 32 if swizzle else right.advance] if products > 1 else [0, 0]
    fragments = np.zeros((products, 128, 4), np.uint32)
    if a_form == "registers":
        fragments = np.stack([a_registers(a[:, i * each : (i + 1) * each], kind) for i in range(products)])
    rows, columns = d_places(n)
    before = np.full(behind // 4, 0xFFFFFFFF, np.uint32)
    a_words, b_words = (
        np.concatenate([before, operand.words(bits_of(matrix, of))])
        for operand, matrix, of in ((left, a, left_kind), (right, b.T, right_kind))
    )
    room = -len(a_words) % 256
    given = [a_words, np.zeros(room, np.uint32), b_words, fragments.ravel(),
             np.asarray(d, np.float32)[rows, columns].ravel().view(np.uint32)]  # fmt: skip
    numbers = [swizzle, len(a_words) + room, len(b_words), left.leading, left.stride, right.leading, right.stride,
               int(add), products, *advance, behind]  # fmt: skip
    found = run(f"{kind}_{n}_{a_form}_{b_form}", np.concatenate(given), 64 * n, numbers)
    result = np.full((64, n), np.nan, np.float32)
    result[rows, columns] = found.view(np.float32).reshape(128, n // 2)
    return result


def exact(kind: str, rng, *shape):
    """Small numbers: every sum of products of them is a float."""
    return rng.integers(-8, 8, shape).astype(np.float64)


FORMS = [("k", "k"), ("k", "mn"), ("mn", "k"), ("mn", "mn"), ("registers", "k"), ("registers", "mn")]


@SWIZZLES
@pytest.mark.parametrize("a_form, b_form", FORMS)
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_a_product_of_every_form_is_a_plain_product(run, kind, a_form, b_form, swizzle):
    if kind == "tf32" and "mn" in (a_form, b_form):
        return  # not an instruction
    depth, rng = 8 if kind == "tf32" else 16, np.random.default_rng(7)
    a, b, d = exact(kind, rng, 64, depth), exact(kind, rng, depth, 64), exact(kind, rng, 64, 64)
    for add in (False, True):
        found = multiply(run, kind, 64, a_form, b_form, swizzle, a, b, d, add)
        np.testing.assert_array_equal(found, a @ b + d * add)


@pytest.mark.parametrize("swizzle", [1, 2, 3], ids=["32B", "64B", "128B"])
@pytest.mark.parametrize("a_form, b_form", FORMS)
@pytest.mark.parametrize("behind", [128, 384, 896])
def test_a_pattern_begins_at_the_base_offset(run, behind, a_form, b_form, swizzle):
    rng = np.random.default_rng(behind)
    a, b, d = exact("bf16", rng, 64, 16), exact("bf16", rng, 16, 64), exact("bf16", rng, 64, 64)
    found = multiply(run, "bf16", 64, a_form, b_form, swizzle, a, b, d, True, behind=behind)
    np.testing.assert_array_equal(found, a @ b + d)


@pytest.mark.parametrize("a_form", ["k", "registers"])
@pytest.mark.parametrize("n", [8, 16, 32, 96, 128, 192, 256])
def test_a_product_of_every_width(run, n, a_form):
    rng = np.random.default_rng(n)
    a, b, d = exact("bf16", rng, 64, 16), exact("bf16", rng, 16, n), exact("bf16", rng, 64, n)
    np.testing.assert_array_equal(multiply(run, "bf16", n, a_form, "k", 3, a, b, d, True), a @ b + d)


@pytest.mark.parametrize("n", [64, 96, 128, 192, 256])
def test_a_product_with_values_of_every_class_of_head_dims(run, n):
    """Of 96, columns end within a swizzle's pattern, whose rest is NaN: what the document, whose layouts are of whole
    patterns, neither allows nor forbids."""
    rng = np.random.default_rng(n)
    a, b, d = exact("bf16", rng, 64, 16), exact("bf16", rng, 16, n), exact("bf16", rng, 64, n)
    np.testing.assert_array_equal(multiply(run, "bf16", n, "registers", "mn", 3, a, b, d, True), a @ b + d)


EIGHT_BITS = pytest.mark.parametrize("kind", ["e4m3", "e5m2_e4m3"])


@SWIZZLES
@EIGHT_BITS
@pytest.mark.parametrize("a_form", ["k", "registers"])
def test_products_of_8_bits_are_plain_products(run, a_form, kind, swizzle):
    """Of small numbers, one step of 32 of k, and as many as a swizzle's row has; with and without what was there."""
    rng = np.random.default_rng(8)
    for products in {1, SPANS[swizzle] // 32 or 4}:
        a, b, d = exact(kind, rng, 64, 32 * products), exact(kind, rng, 32 * products, 64), exact(kind, rng, 64, 64)
        for add in (False, True):
            found = multiply(run, kind, 64, a_form, "k", swizzle, a, b, d, add, products)
            np.testing.assert_array_equal(found, a @ b + d * add)


@EIGHT_BITS
def test_every_number_of_8_bits_is_the_one_that_it_stands_for(run, kind):
    """Each of both formats once, by products with 1: those of a, in 4 columns of k, and those of b."""
    left, right = (BYTES[of] for of in (kind.split("_") if "_" in kind else (kind, kind)))
    numbers = torch.arange(256, dtype=torch.uint8)
    for dtype, of_a in ((left, True), (right, False)):
        every = numbers.view(dtype).double().view(64, 4)
        for column in range(4):
            many, one = np.zeros((64, 32)), np.zeros((32, 64))
            many[:, 5], one[5] = every[:, column].nan_to_num(0, posinf=0, neginf=0).numpy(), 1
            a, b = (many, one) if of_a else (one.T, many.T)
            found = multiply(run, kind, 64, "k", "k", 1, a, b, np.zeros((64, 64)), False)
            expected = many[:, 5:6] * np.ones((1, 64))
            np.testing.assert_array_equal(found, expected if of_a else expected.T)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_a_product_of_random_numbers(run, kind):
    """Within a few units in the last place of the largest term, whatever the order of the sum."""
    depth, rng = 8 if kind == "tf32" else 16, np.random.default_rng(3)
    a, b = (rng.integers(-64, 64, size) / 16 for size in ((64, depth), (depth, 64)))
    d = rng.standard_normal((64, 64)).astype(np.float32)
    found = multiply(run, kind, 64, "k", "k", 3 if depth == 16 else 1, a, b, d, True)
    terms = np.abs(d) + np.abs(a) @ np.abs(b)
    assert (np.abs(found - (d.astype(np.float64) + a @ b)) <= terms * 2.0**-22).all()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_infinity_and_nan_reach_their_row_or_column_alone(run, kind):
    depth = 8 if kind == "tf32" else 16
    a, b = np.ones((64, depth)), np.ones((depth, 64))
    a[35, 5], b[2, 6] = np.inf, np.nan
    found = np.delete(multiply(run, kind, 64, "k", "k", 2, a, b, np.zeros((64, 64)), False), 6, axis=1)
    assert np.isinf(found[35]).all() and (np.delete(found, 35, axis=0) == depth).all()


@pytest.mark.parametrize("a_form", ["k", "registers"])
@pytest.mark.parametrize("swizzle", [0, 3], ids=["plain", "128B"])
@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_descriptors_advance_along_k(run, kind, swizzle, a_form):
    products, rng = 4, np.random.default_rng(2)
    depth = products * (8 if kind == "tf32" else 16)
    a, b, d = exact(kind, rng, 64, depth), exact(kind, rng, depth, 64), exact(kind, rng, 64, 64)
    found = multiply(run, kind, 64, a_form, "k", swizzle, a, b, d, True, products)
    np.testing.assert_array_equal(found, a @ b + d)


# ---- clusters and warps ----------------------------------------------------------------------------------------------


def test_a_multicast_brings_a_box_to_every_block(run):
    rows = np.random.default_rng(2).integers(0, 2**32, (2, 256), dtype=np.uint32)  # of two clusters of two blocks
    found = run("multicast", rows.ravel(), 1024).reshape(2, 2, 256)
    np.testing.assert_array_equal(found, np.stack([rows, rows], 1))


def test_blocks_that_are_no_whole_clusters_are_an_error_that_names_them(run):
    said = (
        r"^layout of int32 \(384,\): .*\(grid \(3, 1, 1\), block \(128, 1, 1\), cluster \(2, 1, 1\), \d+ bytes of "
        r"dynamic shared memory\)$"
    )
    with pytest.raises(RuntimeError, match=said):
        run("multicast", np.zeros(3 * 128), 3 * 256)


@pytest.mark.parametrize("name", ["ring", "wide_ring"])
def test_blocks_write_to_and_read_from_each_other(run, name):
    words = np.random.default_rng(2).integers(0, 2**31, (2, 4, 32), dtype=np.uint32)  # two rings of four blocks
    found = run(name, words.ravel(), 256).reshape(2, 4, 32)
    np.testing.assert_array_equal(found, np.roll(words, 1, axis=1) + np.roll(words, -1, axis=1))


def test_registers_change_hands_and_one_lane_is_elected(run):
    np.testing.assert_array_equal(run("registers", np.zeros(4), 16), np.full(16, 2))


@pytest.mark.parametrize("name", ["arriving_copies", "also_arriving_copies"])
def test_copies_arrive_at_an_mbarrier_by_themselves(run, name):
    words = np.random.default_rng(2).integers(0, 2**32, 128, dtype=np.uint32)
    np.testing.assert_array_equal(run(name, words, 128), words[::-1])
