"""Hopper's attention (csrc/cuda/attention_sm90a_forward.cu) in the simulator: the samples of all options, the edges of
its tiles, neighbours that are not numbers, equal bits under every schedule, who takes a call, and lines broken. Samples
and edges run backward, too; what is the backward's own is in test_attention_sm90a_backward.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.cuda.attention import hopper_refuses
from llmengine.backends.cuda.native import ATTENTION, Native, attention_by
from llmengine.testing import Operator, Sample, poison
from llmengine.testing.samples import attention
from llmengine.testing.simulator import SCHEDULES

from .harness import ROOT, built_with, loaded, on_hopper, schedule
from .test_attention import HALVES, HEAVY, SDPA, assert_right, sample_of


@pytest.fixture(autouse=True)
def asked_for(request, monkeypatch):
    schedule(request)
    monkeypatch.setenv(ATTENTION, "sm90a")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The kernels that ran, by name."""
    names: list[str] = []
    call = Native.call

    def noted(self, kernel, on, **arguments):
        names.append(kernel)
        call(self, kernel, on, **arguments)

    monkeypatch.setattr(Native, "call", noted)
    return names


PLACES = pytest.mark.parametrize("backend", ["cuda_sim", *(["cuda"] if on_hopper() else [])], ids="{}-sm90a".format)


def lined_up(x: Tensor) -> Tensor:
    """Rows at multiples of 16 bytes, NaN between them."""
    if x.ndim < 3 or not x.is_floating_point():
        return x
    wide = x.new_full((*x.shape[:-1], -(-x.shape[-1] // 8) * 8), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def cases() -> list:
    """A sixth of the samples, each in one dtype; the others on demand."""
    return [
        pytest.param(
            op, s, HALVES[i.bit_count() % 2], id=f"{op.name}-{s.name}", marks=[pytest.mark.heavy] * (i % 6 != 1)
        )
        for op in attention.OPERATORS
        for i, s in enumerate(op.samples())
    ]


@pytest.mark.parametrize("op, sample, dtype", cases())
@PLACES
def test_samples_of_all_options(op: Operator, sample: Sample, dtype: torch.dtype, backend: str, ran: list[str]):
    assert_right(op, sample, dtype, lined_up, backend)
    told = all(t.numel() > 0 for t in sample.args[:3]) and "broadcast" not in sample.name  # whose strides are 0
    assert ran[0] == ("attention_forward_sm90a" if told else "attention_forward")
    assert ran[-1] == ("attention_backward_sm90a" if told else "attention_backward")


# One line short of a warpgroup's rows and of a block's, and of tiles of keys (128, 112, 96, 80, 64, 48); whole ones;
# one more; in every class of head dims.
EDGES = [
    (64, 63, 127), (64, 64, 128), (40, 65, 129), (8, 1, 1), (64, 129, 257),
    (96, 128, 128), (72, 129, 127), (128, 127, 129), (128, 128, 112), (104, 33, 225),
    (192, 65, 97), (136, 64, 81), (256, 129, 63), (200, 17, 145), (256, 64, 48),
]  # fmt: skip
# Values narrower than keys: in a class of their own, with tiles of 128 and 112 keys, and in keys'.
NARROW = [(192, 128, 65, 129), (136, 64, 17, 113), (192, 128, 129, 111), (200, 128, 33, 65)]
MASKS: list[dict[str, Any]] = [
    {"causal": "bottom_right"}, {"is_causal": True, "dropout_p": 0.2}, {"window_size": (20, 3)}, {"scale": -0.2},
    {"softcap": 1.5, "causal": "bottom_right", "dropout_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("dim, rows, keys", EDGES)
@PLACES
def test_edges_of_tiles(dim: int, rows: int, keys: int, backend: str, ran: list[str]):
    number = EDGES.index((dim, rows, keys))
    for i in (number % 5, (number + 2) % 5):
        heads, key_heads = (4, 2) if rows * keys < 3000 else (1, 1)
        sample = sample_of(f"{MASKS[i]}", rows, keys, dim, heads, key_heads, return_lse=True, **MASKS[i])
        assert_right(SDPA, sample, HALVES[(i + number) % 2], backend=backend)
    assert ran.count("attention_forward_sm90a") == 2


@pytest.mark.parametrize("dim, value_dim, rows, keys", NARROW)
@PLACES
def test_values_narrower_than_keys(dim: int, value_dim: int, rows: int, keys: int, backend: str, ran: list[str]):
    number = NARROW.index((dim, value_dim, rows, keys))
    options = MASKS[(0, 4, 2, 1)[number]]
    sample = sample_of(f"{options}", rows, keys, dim, 1, 1, value_dim=value_dim, return_lse=True, **options)
    assert_right(SDPA, sample, HALVES[number % 2], backend=backend)
    assert ran[0] == "attention_forward_sm90a"


def test_heads_between_tokens_and_other_layouts_have_the_same_bits(ran: list[str]):
    g = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, n, 3, 56, generator=g).half()[..., 8:].transpose(1, 2) for n in (70, 90, 90))
    with llmengine.backend("cuda_sim"), poison():
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        same = functional.scaled_dot_product_attention(*(t.contiguous() for t in (query, key, value)), is_causal=True)
    assert torch.equal(found, same) and set(ran) == {"attention_forward_sm90a"}


def test_equal_bits_under_every_schedule_when_blocks_take_several_tiles(ran: list[str]):
    """Three multiprocessors draw twelve tiles."""
    from llmengine import _cuda_sim

    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, n, 300, 72, generator=g).bfloat16() for n in (4, 2, 2))
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        torch.manual_seed(5)
        with llmengine.backend("cuda_sim"), poison():
            results.append(
                functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True, dropout_p=0.3, return_lse=True
                )
            )
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert ran == ["attention_forward_sm90a"] * len(SCHEDULES)


@pytest.mark.parametrize("dim", [32, 136])
def test_neighbours_that_are_not_numbers_change_nothing_in_a_packed_sequence(dim: int, ran: list[str]):
    """Boxes bring the next sequence's rows along; tokens that belong to none give zeros."""
    lengths = [5, 0, 150, 33]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    g = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(sum(lengths) + 140, 2, dim, generator=g).half() for _ in range(3))
    for strange in (torch.nan, torch.inf):
        for odd in (0, 1):  # every other sequence is strange, and so are the tokens behind the last
            q, k, v = (t.clone() for t in (query, key, value))
            spans = list(itertools.pairwise(ends.tolist()))
            for first, last in [*spans[odd::2], (int(ends[-1]), None)]:
                for t in (q, k, v):
                    t[first:last] = strange
            with llmengine.backend("cuda_sim"), poison():
                packed = functional.varlen_attention(q, k, v, ends, ends, 150, 150, is_causal=True)
                for first, last in spans[1 - odd :: 2]:
                    rows = (t[first:last].transpose(0, 1) for t in (query, key, value))
                    alone = functional.scaled_dot_product_attention(*rows, is_causal=True)
                    assert torch.equal(packed[first:last], alone.transpose(0, 1))
            assert not packed[ends[-1] :].any()
    assert "attention_forward_sm90a" in ran


def test_rows_that_see_no_key_are_zero_and_only_the_sink_counts(ran: list[str]):
    """Whatever values are: the last one's is for the last row alone."""
    g = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(1, 2, n, 64, generator=g).bfloat16() for n in (200, 40, 40))
    value[:, :, 39] = torch.nan
    sinks = torch.tensor([0.5, -1.0])
    with llmengine.backend("cuda_sim"), poison():
        output, lse = functional.scaled_dot_product_attention(
            query, key, value, causal="bottom_right", sinks=sinks, return_lse=True
        )
        bare, none = functional.scaled_dot_product_attention(query, key, value, causal="bottom_right", return_lse=True)
    for y in (output, bare):
        assert (y[:, :, :160] == 0.0).all() and y[:, :, 199].isnan().all()
    assert torch.allclose(lse[0, :, :160], sinks[:, None].expand(2, 160))
    assert (none[:, :, :160] == -torch.inf).all() and none[:, :, 160:].isfinite().all()
    assert ran == ["attention_forward_sm90a"] * 2


# ---- who takes a call ------------------------------------------------------------------------------------------------


def test_layouts_that_tensor_maps_cannot_tell_go_to_every_gpus_kernel(ran: list[str]):
    g = torch.Generator().manual_seed(6)
    flat = torch.randn(4000, generator=g).half()
    good = flat.as_strided((2, 3, 10, 16), (480, 160, 16, 1))
    keys = {
        "key: data at an odd address; allowed: multiples of 16 bytes": flat[1:].as_strided(good.shape, good.stride()),
        "key: dimension 2 has a stride of 34 bytes; allowed: multiples of 16, above 0": flat.as_strided(
            good.shape, (600, 200, 17, 1)
        ),
        "key: dimension 1 has a stride of 0 bytes": flat.as_strided(good.shape, (480, 0, 16, 1)),
        "key: dimension 0 has a stride of 964 bytes": flat.as_strided(good.shape, (482, 160, 16, 1)),
        "key: dimension 2 has size 0": good[:, :, :0],
    }
    for reason, key in keys.items():
        with llmengine.backend("cuda_sim"):
            found = functional.scaled_dot_product_attention(good, key, key)
            told = llmengine.explain(functional.scaled_dot_product_attention, good, key, key)
        assert f"cuda_sim (by every GPU's kernels: {reason}" in told
        assert str(hopper_refuses(cuda_sim.NATIVE, query=good, key=key, value=key)).startswith(reason)
        with llmengine.backend("reference"):
            expected = functional.scaled_dot_product_attention(*(t.double() for t in (good, key, key)))
        assert torch.allclose(found.double(), expected, atol=2e-3)
    assert set(ran) == {"attention_forward"}
    assert hopper_refuses(cuda_sim.NATIVE, query=good, key=good, value=good) is None


def test_it_runs_where_it_is_asked_for_and_nowhere_else(ran: list[str], monkeypatch):
    q = torch.randn(1, 1, 8, 16).half()
    for value, kernel in (
        ("sm80", "attention_forward"),
        ("", "attention_forward"),
        ("sm90a", "attention_forward_sm90a"),
    ):
        monkeypatch.setenv(ATTENTION, value)
        with llmengine.backend("cuda_sim"):
            functional.scaled_dot_product_attention(q, q, q)
        assert ran[-1] == kernel
    with attention_by("sm100"), llmengine.backend("cuda_sim"):
        with pytest.raises(ValueError, match="LLMENGINE_CUDA_ATTENTION: 'sm100' is not one of sm80, sm90a"):
            functional.scaled_dot_product_attention(q, q, q)
    monkeypatch.setattr(cuda_sim.NATIVE, "capability", lambda on: (8, 0))
    with llmengine.backend("cuda_sim"):
        with pytest.raises(RuntimeError, match=r"sm90a is for compute capability 9\.0, the device has 8\.0"):
            functional.scaled_dot_product_attention(q, q, q)


# ---- one line broken -------------------------------------------------------------------------------------------------


HEADERS = (
    "attention_sm90a_keys.cuh", "attention_sm90a_grid.cuh", "attention_sm90a_backward.cuh",
    "attention_sm90a_forward.cuh", "attention_sm90a.cuh", "attention_places.h", "attention_packed.h",
    "wgmma_tile.cuh",
)  # fmt: skip


def broken(kernel: str, line: tuple[str, str], classes: tuple[str, str], folder: Path) -> Path:
    """The module with two changes, each in the first of the kernel's files that has the text."""
    changes: dict[str, list[tuple[str, str]]] = {f"{kernel}.cu": []}
    for change in (line, classes):
        for file in (f"{kernel}.cu", *HEADERS):
            if change[0] in (ROOT / "csrc/cuda" / file).read_text():
                changes.setdefault(file, []).append(change)
                break
        else:
            raise ValueError(f"the line to break has changed: change this test with it: {change[0]}")
    own = changes.pop(f"{kernel}.cu") or [("", "")]
    (folder / "cuda").mkdir()
    for file, each in changes.items():
        text = (ROOT / "csrc/cuda" / file).read_text()
        for part, becomes in each:
            text = text.replace(part, becomes, 1)
        (folder / "cuda" / file).write_text(text)
    return built_with(kernel, f"{kernel}.cu", *own[0], folder, tuple(own[1:]))


KERNEL = "attention_sm90a_forward"
LATE = "with no mbarrier_wait between|reads shared memory that no thread|what a product of|deadlock"
# line, what it becomes, what must be said: a wrong result, or what the simulator found
BREAKS = {
    "no wait for keys": (
        "    ptx::mbarrier_wait(&shared.key_full[turn.stage()], turn.parity());\n    order.take();",
        "    order.take();", LATE,
    ),
    "no wait for values": (
        "    ptx::mbarrier_wait(&shared.value_full[values.stage()], values.parity());\n", "", LATE,
    ),
    "no wait for queries": (
        "    ptx::mbarrier_wait(&shared.query_full[stage], query.parity());\n", "", LATE,
    ),
    "wrong parity of keys": (
        "shared.key_free[stage], turn.parity() ^ 1", "shared.key_free[stage], turn.parity()", LATE,
    ),
    "wrong parity of values": (
        "shared.value_full[values.stage()], values.parity()", "shared.value_full[values.stage()], values.parity() ^ 1",
        LATE,
    ),
    "keys fetched over keys": (
        "ptx::mbarrier_wait(&shared.key_free[stage], turn.parity() ^ 1);", "",
        "its copy writes|phase waits",
    ),
    "values fetched over values": (
        "ptx::mbarrier_wait(&shared.value_free[stage], turn.parity() ^ 1);", "", "its copy writes|phase waits",
    ),
    "queries fetched over outputs": (
        "ptx::mbarrier_wait(&shared.query_free[stage], query.parity() ^ 1);", "",
        "phase|what a product of|with no (barrier|mbarrier_wait|fence_async)",
    ),
    "outputs not shown to the unit": (
        "    ptx::fence_async_shared();\n    give_back_by_warps(", "    give_back_by_warps(",
        "with no fence_async between",
    ),
    "values given back while multiplied": (
        "    ptx::wgmma_wait<0>(flat(output));\n    give_back(&shared.value_free[values.stage()]);",
        "    give_back(&shared.value_free[values.stage()]);\n    ptx::wgmma_wait<0>(flat(output));",
        "its copy writes .* what a product of|deadlock",
    ),
    "scores read while under way": ("    ptx::wgmma_wait<1>(flat(x));\n", "", "accumulators of a product"),
    "outputs rescaled while under way": (
        "    ptx::wgmma_wait<0>(flat(output));\n    give_back", "    give_back", "of a product .* with no wgmma_wait",
    ),
    "no fence before products": ("    ptx::wgmma_fence(flat(x));\n", "", "since its last wgmma_fence"),
    "neighbours' values stay": (
        "clear_rows<S::value_panels, S::keys>(shared.value[stage], w.s.keys - key);", "", "differs"
    ),
    "cleared rows not shown to the unit": (
        "        ptx::fence_async_shared();\n        __syncwarp();\n        if (elected)", "        if (elected)",
        "with no fence_async between|races",
    ),
    "cleared before they land": (
        "        ptx::mbarrier_wait(&shared.landed, landed);\n", "", "with no mbarrier_wait|races",
    ),
    "a turn is not passed on": (
        "    if constexpr (S::by_turns) ptx::barrier_arrive(kFirst + (group + 1) % S::groups, kThreads);\n", "",
        "deadlock",
    ),
    "keys of another panel": ("panel * 8 * n * 128 + within", "panel * 8 * n * 64 + within", "differs|swizzle"),
    "values of another panel": (
        "matrix_descriptor(right, steps * 16 * 128,", "matrix_descriptor(right, steps * 16 * 64,",
        "differs|out of shared",
    ),
    "sums are not rescaled": ("    rescale(output, rescaling);\n", "", "differs"),
    "keys of another head": ("key_head = w.head / p.sizes.group", "key_head = w.head % p.sizes.group", "differs"),
    "a tile is left out": ("atomicAdd(room, 1)", "atomicAdd(room, 2)", "differs"),
    "too many registers": ("kManyRegisters = 232", "kManyRegisters = 240", "deadlock .* at increase_registers"),
    "the rest is not cleared": ("head < p.sizes.heads; ++head", "head < 1; ++head", "differs"),
}  # fmt: skip


def assert_near(function, sample: Sample) -> None:
    """Outputs and log-sum-exp in float16, forward alone."""
    given = sample.rounded(torch.float16, lined_up)
    results = []
    for name, s in (("cuda_sim", given), ("reference", given.rounded(torch.float64))):
        torch.manual_seed(8)
        with llmengine.backend(name), poison():
            results.append(function(*s.args, **s.kwargs, return_lse=True))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found.double(), expected.double(), atol=4e-3), "differs"


def try_attention() -> None:
    two = sample_of("two heads", 130, 260, 72, 2, 1, causal="bottom_right", dropout_p=0.2)
    assert_near(functional.scaled_dot_product_attention, two)
    window = sample_of("more tiles than blocks hold queries", 20, 150, 40, 8, 8, window_size=(100, 10))
    assert_near(functional.scaled_dot_product_attention, window)
    m = attention._Maker(1)
    m.packed("packed", [40, 9], [33, 150], 2, 2, 24, spare=3)
    m.samples[0].args[1][-3:] = m.samples[0].args[2][-3:] = torch.nan  # tokens of no sequence
    assert_near(functional.varlen_attention, m.samples[0])


def test_whole_kernels_pass_what_broken_ones_must_fail():
    try_attention()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 5 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    line, becomes, said = BREAKS[name]
    # one class of head dims compiles in a fraction of the time
    narrow = ("visit_pairs_of_dims<64, 96, 128, 192, 256>", "visit_pairs_of_dims<128>")
    module = broken(KERNEL, (line, becomes), narrow, tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_attention()
