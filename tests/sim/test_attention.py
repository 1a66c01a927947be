"""CUDA attention (csrc/cuda/attention_sm80_*.cu) in the simulator: the samples that every backend's laws are tried on,
the edges of its tiles, layouts, equal bits under every schedule, refusals, and kernels with one line broken.
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
from llmengine.backends.cuda.native import exact_kernels
from llmengine.testing import Operator, Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT
from llmengine.testing.samples import attention
from llmengine.testing.simulator import SCHEDULES

from .harness import ROOT, built_with, device_of, loaded, places, schedule

HEAVY = (pytest.mark.heavy,)
HALVES = (torch.bfloat16, torch.float16)
BY_SM80 = "{}-sm80".format


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


def assert_right(
    op: Operator, sample: Sample, dtype: torch.dtype, layout=lambda x: x, backend: str = "cuda_sim"
) -> None:
    """Outputs and all gradients by the law."""
    given = sample.on(device_of(backend)).rounded(dtype, layout)
    oracle = evaluate(op.function, given.rounded(torch.float64), "reference")
    plain = evaluate(op.plain, given, "reference")  # where it is no function of PyTorch
    with poison():
        ours = evaluate(lambda *args, **kwargs: lying(op.function(*args, **kwargs), layout), given, backend)
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name} {dtype}: output")
    if sample.kwargs.get("return_lse"):
        assert_lse(*(outputs[1].double() for outputs, _ in (ours, plain, oracle)))
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name} {dtype}: grad {key}")


class Lying(torch.autograd.Function):
    """A tensor whose gradient comes in a layout."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.layout(gradient), None


def lying(outputs, layout):
    return [Lying.apply(x, layout) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]


def assert_lse(ours: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """The law, and what the special function unit's exponentials, off by 2^-22 of themselves, leave in float32."""
    assert torch.equal(ours.isinf(), oracle.isinf())
    seen = oracle.isfinite()
    if seen.any():
        o = oracle[seen]
        allowed = OUTPUT * (plain[seen] - o).abs().max() + 2**-20 + 2**-22 * o.abs().max()
        assert (ours[seen] - o).abs().max() <= allowed, "lse exceeds"


SDPA, VARLEN = attention.OPERATORS


def sample_of(name: str, rows: int, keys: int, dim: int, heads: int = 1, key_heads: int = 1, **options: Any) -> Sample:
    m = attention._Maker(rows + keys + dim)
    m.padded(name, 1, heads, rows, keys, dim, key_heads=key_heads, **options)
    return m.samples[0]


def cases() -> list:
    """A sixth of the samples, each in one dtype; the others on demand."""
    return [
        pytest.param(
            op, s, HALVES[i.bit_count() % 2], id=f"{op.name}-{s.name}", marks=[pytest.mark.heavy] * (i % 6 > 0)
        )
        for op in attention.OPERATORS
        for i, s in enumerate(op.samples())
    ]


@pytest.mark.parametrize("op, sample, dtype", cases())
@pytest.mark.parametrize("backend", places(), ids=BY_SM80)
def test_samples_of_all_options(op: Operator, sample: Sample, dtype: torch.dtype, backend: str):
    assert_right(op, sample, dtype, backend=backend)


# ---- tiles -----------------------------------------------------------------------------------------------------------

# One line short of a tile of rows, of keys; whole ones; one line more; in every class of head dims, some of them whole.
EDGES = [
    (64, 1, 1), (64, 127, 63), (40, 128, 64), (64, 129, 65), (8, 17, 129),
    (128, 127, 47), (96, 128, 96), (72, 129, 49), (128, 33, 65),
    (256, 63, 63), (136, 64, 64), (192, 65, 65), (200, 16, 17),
]  # fmt: skip
MASKS: list[dict[str, Any]] = [
    {"causal": "bottom_right"}, {"is_causal": True, "dropout_p": 0.2}, {"window_size": (20, 3)}, {"scale": -0.2},
]  # fmt: skip


@pytest.mark.parametrize("dim, rows, keys", EDGES)
@pytest.mark.parametrize("backend", places(), ids=BY_SM80)
def test_edges_of_tiles(dim: int, rows: int, keys: int, backend: str):
    for i in (0, 2) if rows % 2 else (1, 3):
        options = MASKS[i]
        heads, key_heads = ((1, 1), (4, 2))[i // 2] if rows * keys < 3000 else (1, 1)
        sample = sample_of(f"{options}", rows, keys, dim, heads, key_heads, return_lse=True, **options)
        assert_right(SDPA, sample, HALVES[(i + dim) % 2], backend=backend)


# Classes that devices compile when they are first used, of which the simulator is built with these: every swizzle, one
# and two blocks of rows, dK and dV in one pass and in two; whole and not, and of odd rows.
EXACT = [(48, 65, 70), (43, 20, 33), (96, 129, 97), (88, 33, 49), (144, 65, 66), (132, 17, 70), (192, 63, 65)]


def exact_cases() -> list:
    """On a GPU those of two classes: twenty kernels, which it compiles first."""
    return [
        pytest.param(backend, *case, id=f"{BY_SM80(backend)}-{case[0]}")
        for backend in places()
        for case in EXACT
        if backend != "cuda" or case[0] in (96, 192)
    ]


@pytest.mark.parametrize("backend, dim, rows, keys", exact_cases())
def test_edges_of_tiles_of_exact_head_dims(backend: str, dim: int, rows: int, keys: int):
    g = torch.Generator().manual_seed(dim)
    mask, table = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, keys), (1, 21)))
    with exact_kernels():
        for i, options in enumerate((MASKS[1] | {"return_lse": True}, {"attn_mask": mask, "distance_bias": table})):
            sample = sample_of(f"{options.keys()}", rows, keys, dim, **options)
            assert_right(SDPA, sample, HALVES[(i + dim) % 2], backend=backend)


@pytest.mark.skipif("cuda" not in places(), reason="machine code runs on a GPU")
@pytest.mark.parametrize("dim", [96, 128, 192])
@pytest.mark.parametrize("backend", [pytest.param("cuda", id="cuda-sm80")])
def test_exact_kernels_are_compiled_and_launched(dim: int, backend: str):
    q, k, v = (torch.randn(1, 2, 65, dim, device="cuda").bfloat16().requires_grad_() for _ in range(3))

    def call():
        y = functional.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(y.sum(), [q, k, v])

    with llmengine.backend(backend), exact_kernels():
        told = llmengine.explain(call)
    for part in ("forward", "rows", "keys"):
        assert (f"attention_{part}_sm80<bf16, {dim}, true" in told) == (dim != 128), told


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_that_begin_anywhere(dtype: torch.dtype):
    """Odd strides and addresses, heads between tokens, and keys that all batch entries and heads share."""
    g = torch.Generator().manual_seed(2)
    query = torch.randn(2, 21, 3, 41, generator=g).to(dtype)[..., 1:].transpose(1, 2)
    key = torch.randn(30, 48, generator=g).to(dtype)[:, 8:].expand(2, 3, 30, 40)
    value = torch.randn(2, 3, 30, 43, generator=g).to(dtype)[..., :40]
    given = [t.detach().requires_grad_() for t in (query, key, value)]
    copies = [t.detach().contiguous().requires_grad_() for t in given]
    upstream = torch.randn(query.shape, generator=g).to(dtype)
    with llmengine.backend("cuda_sim"), poison():
        found, expected = (
            [y, *torch.autograd.grad(y, tensors, upstream)]
            for tensors in (given, copies)
            for y in [functional.scaled_dot_product_attention(*tensors, is_causal=True)]
        )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_equal_bits_under_every_schedule():
    from llmengine import _cuda_sim

    sample = sample_of("schedules", 70, 140, 72, 4, 2, causal="bottom_right", window_size=(90, -1), dropout_p=0.3)
    given = sample.rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        outputs, gradients = evaluate(SDPA.function, given, "cuda_sim")
        results.append([*outputs, *gradients.values()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_packed_sequences_have_the_bits_of_single_ones():
    """Each in tiles of its own: neighbours change nothing, nor do tokens that belong to no sequence."""
    lengths = [5, 0, 70, 33]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    g = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(sum(lengths) + 4, 2, 32, generator=g).half() for _ in range(3))
    with llmengine.backend("cuda_sim"), poison():
        packed = functional.varlen_attention(query, key, value, ends, ends, 70, 70, is_causal=True)
        for first, last in itertools.pairwise(ends.tolist()):
            q, k, v = (t[first:last].transpose(0, 1) for t in (query, key, value))
            alone = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            assert torch.equal(packed[first:last], alone.transpose(0, 1))
    assert not packed[ends[-1] :].any()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_supported_names_itself():
    q = torch.randn(1, 2, 8, 16)
    with llmengine.backend("cuda_sim"):
        with pytest.raises(RuntimeError, match="multiplies bfloat16 and float16, got float32"):
            functional.scaled_dot_product_attention(q, q, q)
        wide = torch.randn(1, 2, 8, 264, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="head dims up to 256, got 264"):
            functional.scaled_dot_product_attention(wide, wide, wide)
        table = torch.randn(2, 2 * 1849 + 1, requires_grad=True)
        y = functional.scaled_dot_product_attention(*[q.bfloat16()] * 3, distance_bias=table)
        with pytest.raises(RuntimeError, match="gradients of distances up to 1848, got 1849"):
            y.sum().backward()


# ---- one line broken -------------------------------------------------------------------------------------------------

FORWARD, KEYS, ROWS, BIAS = (f"attention_sm80_{part}" for part in ("forward", "keys", "rows", "bias"))
LOGITS, BACKWARD, TILES = "attention_logits.cuh", "attention_sm80_backward.cuh", "matrix_tile.cuh"
SOFTMAX = "attention_forward.cuh"
WAIT = "ptx::wait_copies<0>();\n    __syncthreads();  // "
# (kernel file, header to break or none: the file, line, what it becomes, what must be said): a wrong result, or what
# the simulator found.
BREAKS = {
    "keys are not waited for": (FORWARD, "", f"{WAIT}the keys", "__syncthreads();  //", "races: .* what a copy"),
    "values are not waited for": (FORWARD, "", f"{WAIT}the values", "__syncthreads();  //", "races: .* what a copy"),
    "no barrier before the keys": (FORWARD, "", "__syncthreads();  // the keys", "//", "races"),
    "no barrier before the values": (FORWARD, "", "__syncthreads();  // the values", "//", "races"),
    "the same keys again": (FORWARD, "", "begin_keys(key + S::keys)", "begin_keys(key)", "exceeds"),
    "sums are not rescaled": (FORWARD, SOFTMAX, "sum[m][half] *= rescaling[m][half];", "", "exceeds"),
    "the maximum of two lanes": (
        FORWARD, SOFTMAX, "most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));", "", "exceeds|differs",
    ),
    "a key too many is seen": (FORWARD, LOGITS, "column >= end", "column > end", "exceeds"),
    "edges are not compared": (FORWARD, "", "if (!reach.all(key,", "if (false && !reach.all(key,", "exceeds"),
    "keys of another head": (FORWARD, "", "head / p.sizes.group;", "head % p.sizes.group;", "exceeds"),
    "draws of another row": (FORWARD, LOGITS, "upper = odd ? others : bits", "upper = odd ? bits : others", "exceeds"),
    "chunks elsewhere": (FORWARD, TILES, "16(to.chunk(row, c)", "16(to.chunk(row ^ 1, c)", "exceeds|nobody"),
    "rows past the last are copied": (FORWARD, TILES, "bytes = row < count ? wide : 0", "bytes = wide", "past the end"),
    "stages are mixed up": (KEYS, "", "begin_stage(stage ^ 1, next", "begin_stage(stage, next", "races"),
    "no barrier between stages": (KEYS, "", "__syncthreads();  // this stage", "//", "races"),
    "one head of a group": (KEYS, "", "place.head + 1) * p.sizes.group", "place.head * p.sizes.group + 1)", "exceeds"),
    "dropped scores pass": (KEYS, "", "drop(kept, dropped, 1.0f);", "", "exceeds"),
    "draws of another lane": (KEYS, LOGITS, "(all >> (4 * i + own) & 1)", "(all >> (4 * own + i) & 1)", "exceeds"),
    "delta is forgotten": (ROWS, BACKWARD, "grad[m][j][i] -= statistics.delta[m][i / 2];", ";", "exceeds"),
    "keys of one stage": (ROWS, "", "const int stage = key / S::keys % 2;", "const int stage = 0;", "exceeds|races"),
    "no barrier after a mask's tiles": (BIAS, "", "__syncthreads();  // every warp is done with them", "", "races"),
    "one head shares a mask": (BIAS, "", "head_end = m.heads == 1 ?", "head_end = m.heads == 0 ?", "exceeds"),
    "rows of one warp": (BIAS, "", "warp < kWarps && threadIdx.x < keys", "warp < 1 && threadIdx.x < keys", "exceeds"),
    "a diagonal too far": (BIAS, "", "r = c - diagonal + kRows - 1", "r = c - diagonal + kRows", "exceeds"),
    "the ends are left out": (BIAS, "", "table[2 * farthest] += right;", "", "exceeds"),
    "no barrier before diagonals": (BIAS, "", "__syncthreads();  // the tile of gradients", "//", "races|no thread"),
    "tokens of no sequence have no places": (FORWARD, LOGITS, "place, lines, true)", "place, lines, false)", "NaN"),
    "the other element": (ROWS, "", "half ? lower[3] : upper[1]", "half ? lower[2] : upper[0]", "exceeds"),
}  # fmt: skip


def try_attention() -> None:
    assert_right(
        SDPA, sample_of("a", 70, 150, 24, 4, 2, causal="bottom_right", dropout_p=0.2, return_lse=True), HALVES[0]
    )
    assert_right(SDPA, sample_of("window", 20, 70, 40, window_size=(30, 10)), HALVES[1])
    g = torch.Generator().manual_seed(1)
    mask, table = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((40, 70), (2, 21)))
    assert_right(SDPA, sample_of("mask", 40, 70, 16, 2, 2, attn_mask=mask, distance_bias=table), HALVES[0])
    assert_right(SDPA, sample_of("one row of a mask", 70, 40, 16, 2, 2, attn_mask=mask[:1, :40]), HALVES[0])
    m = attention._Maker(2)
    m.packed("packed", [40, 0, 9], [33, 5, 9], 2, 2, 16, spare=140)
    assert_right(VARLEN, m.samples[0], HALVES[0])


def test_whole_kernels_pass_what_broken_ones_must_fail():
    try_attention()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 3 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    source, header, line, broken, said = BREAKS[name]
    narrow = tmp_path / "cuda" / "attention_call.h"  # one class of head dims compiles in a third of the time
    narrow.parent.mkdir()
    classes = (ROOT / "csrc/cuda" / narrow.name).read_text()
    assert classes.count("64, 128, 256") == 2  # those that serve, and those that are built ahead
    narrow.write_text(classes.replace("64, 128, 256", "64"))
    module = built_with(source, header or f"{source}.cu", line, broken, tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_attention()
