"""Attention with products of 8-bit floats (csrc/cuda/attention_fp8_{quantise,forward}_sm90a.cu) in the simulator: tiles
of bytes are the reference's numbers, one by one; results by the law, and much nearer to the reference's than what
rounding costs; edges of tiles, what is not finite, equal bits under every schedule, refusals, broken lines.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.fp8 import TILE, keys_of_step, width_of
from llmengine.backends.reference.fp8_attention import operand, quantise
from llmengine.testing import Operator, Sample, assert_law, evaluate, poison
from llmengine.testing.law import OUTPUT
from llmengine.testing.samples import fp8_attention as samples
from llmengine.testing.simulator import SCHEDULES

from .harness import Break, built_with, device_of, loaded, on_hopper, schedule
from .test_attention import HALVES, HEAVY, assert_lse
from .test_fp8 import one_nan

PLACES = pytest.mark.parametrize("backend", ["cuda_sim", *(["cuda"] if on_hopper() else [])], ids="{}-sm90a".format)
SDPA, VARLEN = samples.OPERATORS


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---- tiles of bytes --------------------------------------------------------------------------------------------------

# The 16 keys of a step in the order of an 8-bit operand's registers: lane t has what a product's sums leave it.
ORDER = [key for t in range(4) for key in (2 * t, 2 * t + 1, 8 + 2 * t, 9 + 2 * t)]


def swizzled(chunk: Tensor, row: Tensor, span: int) -> Tensor:
    return chunk ^ (row % 8 if span == 128 else row // 2 % 4)


def places_of_rows(width: int, at_a_time: int) -> Tensor:
    """Of (token, column) in a tile of queries or keys."""
    row, column, span = torch.arange(TILE)[:, None], torch.arange(width), min(width, 128)
    lines = row // at_a_time * at_a_time * width + (column // span * at_a_time + row % at_a_time) * span
    return lines + swizzled(column % span // 16, row, span) * 16 + column % 16


def places_of_values(width: int, step: int) -> Tensor:
    """Of (token, column) in a tile of values."""
    key, column = torch.arange(TILE)[:, None], torch.arange(width)
    lines = key // step * step * width + column * step
    return lines + swizzled(key % step // 16, column, step) * 16 + torch.tensor(ORDER).argsort()[key % 16]


def module():
    assert cuda_sim.NATIVE.missing() is None
    return cuda_sim.NATIVE.module


def assert_tiles(x: Tensor, name: str, cu_seqlens: Tensor | None = None, width: int = 0) -> None:
    """x: (batch, heads, tokens, columns)."""
    batch, heads, tokens, columns = x.shape
    width = width or width_of(columns)
    if cu_seqlens is None:
        first = [n * -(-tokens // TILE) for n in range(batch)]
        spans, tiles = [(0, tokens)] * batch, batch * -(-tokens // TILE)
    else:
        spans = list(itertools.pairwise(cu_seqlens.tolist()))
        first, tiles = [begin // TILE + n for n, (begin, _) in enumerate(spans)], tokens // TILE + len(spans)
    numbers = torch.full((tiles, heads, TILE * width), 0xAA, dtype=torch.uint8)
    scales = torch.full((tiles, heads), torch.nan)
    module().attention_fp8_quantise(
        x=x, cu_seqlens=cu_seqlens, operand=name, numbers=numbers, scales=scales, stream=0
    )  # fmt: skip
    step = keys_of_step(width)
    places = (
        places_of_values(width, step) if name == "value" else places_of_rows(width, 64 if name == "query" else step)
    )
    for n, (begin, end) in enumerate(spans):
        of = x[n if cu_seqlens is None else 0, :, begin:end]
        given = operand(of, True) if name != "value" else torch.nn.functional.pad(of.float(), (0, width - columns))
        expected, expected_scales = quantise(given)
        for tile in range(-(-(end - begin) // TILE)):
            found = numbers[first[n] + tile][:, places]
            inside = expected[:, tile * TILE : (tile + 1) * TILE].view(torch.uint8)
            assert torch.equal(scales[first[n] + tile], expected_scales[:, tile]), name
            assert torch.equal(one_nan(found[:, : inside.shape[1]], "e4m3"), one_nan(inside, "e4m3")), name
            assert not (found[:, inside.shape[1] :] & 0x7F).any(), "what is missing is 0"


@pytest.mark.parametrize("tokens, columns", [(1, 1), (5, 64), (128, 40), (130, 128), (257, 72), (140, 256), (20, 200)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tiles_are_the_references_numbers(native, dtype: torch.dtype, tokens: int, columns: int):
    """Numbers of many magnitudes, so that all of the format's are met."""
    heads = 3 if tokens < 100 else 1
    x = (randn(2, heads, tokens, columns) * 2.0 ** (torch.arange(tokens) % 11 - 5)[:, None]).to(dtype)
    for i, name in enumerate(("query", "key", "value")):
        native.set_schedule(SCHEDULES[i], i)
        assert_tiles(x, name)
        assert_tiles(x.transpose(1, 2).contiguous().transpose(1, 2)[..., : columns // 2 + 1], name)


def test_tiles_of_packed_sequences_and_of_narrow_values(native):
    native.set_schedule("random", 3)
    for lengths in ([5, 0, 130, 33, 0], [128, 256, 1], [], [300]):
        x = randn(1, 2, sum(lengths) + 40, 48).bfloat16()
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        for name in ("query", "key", "value"):
            assert_tiles(x, name, ends)
    assert_tiles(randn(1, 2, 140, 48).half(), "value", width=256)


def test_extremes(native):
    """Zeros, the least and the largest numbers, infinities, NaN."""
    native.set_schedule("reversed", 5)
    special = torch.tensor([0.0, -0.0, 2.0**-133, -(2.0**-126), 3e38, torch.inf, -torch.inf, torch.nan])
    x = randn(1, 1, 200, 32)
    x.view(-1)[::97] = special.repeat(100)[: len(x.view(-1)[::97])]
    for name in ("query", "key", "value"):
        assert_tiles(x.bfloat16(), name)
        for value in special:
            assert_tiles(torch.full((1, 1, 3, 20), value.item()).bfloat16(), name)


# ---- attention -------------------------------------------------------------------------------------------------------


def assert_right(op: Operator, sample: Sample, dtype: torch.dtype, backend: str = "cuda_sim") -> None:
    """By the law, of which the oracle has the same numbers but does not round probabilities; and near the reference,
    which does: what lies between them are a few that exponentials off by 2^-22 round to the other side. On a device
    scores are off by 2^-13 of their terms, and it is more than a few."""
    given = sample.on(device_of(backend)).rounded(dtype)
    oracle = evaluate(op.function, given.rounded(torch.float64), "reference")[0]
    plain = evaluate(op.function, given, "reference")[0]
    with poison():
        ours = evaluate(op.function, given, backend)[0]
    assert_law(ours[0], plain[0], oracle[0], OUTPUT, f"{sample.name} {dtype}: output")
    if oracle[0].numel():
        rounding, apart = ((y.double() - x.double()).square().mean().sqrt() for y, x in (
            (plain[0], oracle[0]), (ours[0], plain[0]),
        ))  # fmt: skip
        assert apart <= rounding / (8 if backend == "cuda_sim" else 1) + 2**-9 * oracle[0].abs().max() / 8, (
            "not the reference's numbers"
        )
    if sample.kwargs.get("return_lse"):
        assert_lse(*(outputs[1].double() for outputs in (ours, plain, oracle)))


def cases() -> list:
    return [
        pytest.param(op, s, HALVES[i // 2 % 2], id=f"{op.name}-{s.name}", marks=HEAVY if i % 2 else ())
        for op in samples.OPERATORS
        for i, s in enumerate(op.samples())
    ]


@pytest.mark.parametrize("op, sample, dtype", cases())
@PLACES
def test_samples_of_all_options(op: Operator, sample: Sample, dtype: torch.dtype, backend: str):
    assert_right(op, sample, dtype, backend)


def sample_of(rows: int, keys: int, dim: int, value_dim: int | None = None, heads: int = 1, **options: Any) -> Sample:
    m = samples._Maker8(rows + keys + dim)
    m.padded(f"{options}", 1, heads, rows, keys, dim, value_dim, **options)
    return m.samples[0]


# One line short of a warpgroup's rows and of a block's, and of steps of 128 and 64 keys; whole ones; one more.
EDGES = [
    (64, 63, 127), (40, 64, 128), (8, 65, 129), (1, 1, 1), (128, 127, 127), (96, 128, 128), (72, 129, 257),
    (256, 63, 63), (136, 64, 64), (192, 65, 65), (200, 17, 129),
]  # fmt: skip
MASKS: list[dict[str, Any]] = [
    {"causal": "bottom_right"}, {"is_causal": True}, {"window_size": (20, 3)}, {"scale": 1.0}, {"return_lse": True},
]  # fmt: skip


@pytest.mark.parametrize("dim, rows, keys", EDGES)
@PLACES
def test_edges_of_tiles(dim: int, rows: int, keys: int, backend: str):
    number = EDGES.index((dim, rows, keys))
    for i in (number % 5, (number + 2) % 5):
        assert_right(SDPA, sample_of(rows, keys, dim, **MASKS[i]), HALVES[(i + number) % 2], backend)


def attend(*operands: Tensor, **options):
    with llmengine.backend("cuda_sim"), poison():
        return functional.scaled_dot_product_attention(*operands, fp8=True, **options)


def test_layouts_have_the_same_bits():
    """Heads between tokens, rows that begin anywhere, one key head for all."""
    query, key, value = (randn(2, n, 3, 57).half()[..., 1:].transpose(1, 2) for n in (70, 90, 90))
    found = attend(query, key, value, is_causal=True)
    assert torch.equal(found, attend(*(t.contiguous() for t in (query, key, value)), is_causal=True))
    shared = key[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(attend(query, shared, shared), attend(query, key[:, :1], key[:, :1]))


def test_equal_bits_under_every_schedule_when_blocks_take_several_tiles(native):
    """Three multiprocessors draw twelve tiles; rings of four stages go around."""
    query, key, value = (randn(1, n, 300, 72, seed=n).bfloat16() for n in (4, 2, 2))
    results = []
    for order in SCHEDULES:
        native.set_schedule(order, 11)
        results.append(attend(query, key, value, is_causal=True, enable_gqa=True, return_lse=True))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_neighbours_that_are_not_numbers_change_nothing_in_a_packed_sequence():
    lengths = [5, 0, 150, 33]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    query, key, value = (randn(sum(lengths) + 140, 2, 32, seed=n).half() for n in range(3))
    spans = list(itertools.pairwise(ends.tolist()))
    for odd in (0, 1):  # every other sequence is strange, and so are the tokens behind the last
        q, k, v = (t.clone() for t in (query, key, value))
        for first, last in [*spans[odd::2], (int(ends[-1]), None)]:
            for t in (q, k, v):
                t[first:last] = torch.nan
        with llmengine.backend("cuda_sim"), poison():
            packed = functional.varlen_attention(q, k, v, ends, ends, 150, 150, is_causal=True, fp8=True)
        for first, last in spans[1 - odd :: 2]:
            alone = attend(*(t[first:last].transpose(0, 1) for t in (query, key, value)), is_causal=True)
            assert torch.equal(packed[first:last], alone.transpose(0, 1))
        assert not packed[ends[-1] :].any()


def test_nan_and_infinity_become_nan_in_their_rows_and_columns_alone():
    query, key, value = (randn(1, 1, 40, 32, seed=n).bfloat16() for n in range(3))
    query[0, 0, 3, 5] = torch.inf
    key[0, 0, 20, 1] = torch.nan
    value[0, 0, 30, 7] = -torch.inf
    found = attend(query, key, value, is_causal=True)[0, 0].isnan()
    expected = torch.zeros(40, 32, dtype=torch.bool)
    expected[3], expected[20:], expected[:, 7] = True, True, True  # 0 times NaN is NaN, as in PyTorch
    assert torch.equal(found, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_zeros_have_no_scale_that_is_none(causal: bool):
    """Two of them at once: the product of their scales is less than a float can be, and hidden logits are -inf."""
    query, key = torch.zeros(2, 1, 1, 40, 32, dtype=torch.bfloat16)
    value = torch.randn(1, 1, 40, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for backend in ("cuda_sim", "reference"):
        with llmengine.backend(backend):
            found.append(
                functional.scaled_dot_product_attention(query, key, value, is_causal=causal, fp8=True, return_lse=True)
            )
    torch.testing.assert_close(found[0], found[1], rtol=2**-4, atol=2**-6)


def test_rows_that_see_no_key_are_zero_and_only_the_sink_counts():
    query, key, value = (randn(1, 2, n, 64).bfloat16() for n in (200, 40, 40))
    sinks = torch.tensor([0.5, -1.0])
    output, lse = attend(query, key, value, causal="bottom_right", sinks=sinks, return_lse=True)
    bare, none = attend(query, key, value, causal="bottom_right", return_lse=True)
    assert not output[:, :, :160].any() and not bare[:, :, :160].any()
    assert torch.allclose(lse[0, :, :160], sinks[:, None].expand(2, 160))
    assert (none[:, :, :160] == -torch.inf).all() and none[:, :, 160:].isfinite().all()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, value, said",
    [
        (torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 16), "rounds bfloat16 and float16, got float32"),
        (torch.zeros(1, 1, 4, 264), torch.zeros(1, 1, 4, 264), "takes head dims up to 256, got 264"),
        (torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4, 65), "values of up to 64 columns beside keys of 64, got 65"),
    ],
)
def test_a_refusal_is_a_sentence(query: Tensor, value: Tensor, said: str):
    if query.shape[-1] != 16:
        query, value = query.half(), value.half()
    with pytest.raises(RuntimeError, match=said):
        attend(query, query, value)


def test_other_gpus_are_refused_and_explain_tells(monkeypatch):
    q = torch.zeros(1, 1, 4, 16).half()
    with llmengine.backend("cuda_sim"):
        told = llmengine.explain(functional.scaled_dot_product_attention, q, q, q, fp8=True)
    assert told == "fp8_attention: cuda_sim"
    monkeypatch.setattr(cuda_sim.NATIVE, "capability", lambda on: (8, 0))
    with pytest.raises(RuntimeError, match=r"8-bit floats are for compute capability 9\.0, the device has 8\.0"):
        attend(q, q, q)


def test_errors_of_the_quantiser_name_argument_given_and_allowed(native):
    x = torch.zeros(2, 3, 130, 72).half()
    given: dict[str, Any] = {"x": x, "cu_seqlens": None, "operand": "key"}
    given |= {"numbers": torch.zeros(4, 3, 128 * 128, dtype=torch.uint8), "scales": torch.zeros(4, 3)}
    for change, said in [
        ({"operand": "mask"}, "operand is 'mask'; allowed: 'query', 'key', 'value'"),
        ({"x": x.float()}, "x has dtype float32; allowed: bfloat16, float16"),
        ({"x": x[0]}, r"x must be \(batch, heads, tokens, head_dim\), got \(3, 130, 72\)"),
        ({"numbers": given["numbers"][:, :, : 128 * 64].contiguous()}, "numbers have 64 columns for 72"),
        (
            {"numbers": given["numbers"][:, :, :100].contiguous()},
            r"numbers has shape \(4, 3, 100\); expected 128 times",
        ),
        ({"numbers": given["numbers"][:3]}, r"numbers has shape \(3, 3, 16384\); expected \(4, 3, 16384\)"),
        ({"scales": torch.zeros(4)}, r"scales has shape \(4,\); expected \(4, 3\)"),
        ({"scales": None}, "scales is required but None was given"),
    ]:
        with pytest.raises(ValueError, match=f"^attention_fp8_quantise: {said}"):
            native.attention_fp8_quantise(**given | change, stream=0)


# ---- one line broken -------------------------------------------------------------------------------------------------

QUANTISE, FORWARD = "attention_fp8_quantise_sm90a", "attention_fp8_forward_sm90a"
LATE = "with no mbarrier_wait between|reads shared memory that no thread|what a product of|deadlock"
WRONG = "exceeds|not the reference|NaN differs"
BREAKS: dict[str, Break] = {
    "no wait for keys": (
        FORWARD, f"{FORWARD}.cu", "    ptx::mbarrier_wait(&shared.key_full[stage], turn.parity());\n", "", LATE,
    ),
    "no wait for values": (
        FORWARD, f"{FORWARD}.cu", "    ptx::mbarrier_wait(&shared.value_full[stage], turn.parity());\n", "", LATE,
    ),
    "no wait for queries": (
        FORWARD, f"{FORWARD}.cu", "    ptx::mbarrier_wait(&shared.query_full[stage], query.parity());\n", "", LATE,
    ),
    "wrong parity of keys": (
        FORWARD, f"{FORWARD}.cu", "shared.key_free[s], turn.parity() ^ 1", "shared.key_free[s], turn.parity()", LATE,
    ),
    "keys fetched over keys": (
        FORWARD, f"{FORWARD}.cu", "ptx::mbarrier_wait(&shared.key_free[s], turn.parity() ^ 1);", "",
        "copy writes|phase waits",
    ),
    "values fetched over values": (
        FORWARD, f"{FORWARD}.cu", "ptx::mbarrier_wait(&shared.value_free[s], turn.parity() ^ 1);", "",
        "copy writes|phase waits",
    ),
    "queries fetched over outputs": (
        FORWARD, f"{FORWARD}.cu", "ptx::mbarrier_wait(&shared.query_free[stage], query.parity() ^ 1);", "",
        "phase|what a product of|with no (barrier|mbarrier_wait|fence_async)",
    ),
    "outputs not shown to the unit": (
        FORWARD, f"{FORWARD}.cu", "    ptx::fence_async_shared();\n    give_back_by_warps(", "    give_back_by_warps(",
        "with no fence_async between",
    ),
    "scores read while under way": (
        FORWARD, f"{FORWARD}.cu", "    ptx::wgmma_wait<0>(flat(x));\n", "",
        "accumulators of a product|copy writes .* what a product of|deadlock",
    ),
    "keys given back while multiplied": (
        FORWARD, f"{FORWARD}.cu", "    ptx::wgmma_wait<0>(flat(x));\n    give_back(&shared.key_free[stage]);",
        "    give_back(&shared.key_free[stage]);\n    ptx::wgmma_wait<0>(flat(x));",
        "copy writes .* what a product of|deadlock",
    ),
    "parts read while under way": (
        FORWARD, f"{FORWARD}.cu", "    ptx::wgmma_wait<0>(flat(sums));\n", "", "of a product .* with no wgmma_wait",
    ),
    "no fence before scores": (
        FORWARD, f"{FORWARD}.cu", "    ptx::wgmma_fence(flat(x));\n", "", "since its last wgmma_fence|no wgmma_fence",
    ),
    "no fence before parts": (
        FORWARD, f"{FORWARD}.cu", "    ptx::wgmma_fence();\n", "", "since its last wgmma_fence",
    ),
    "a turn is not passed on": (FORWARD, f"{FORWARD}.cu", "    order.pass();\n", "", "deadlock"),
    "outputs are not rescaled": (FORWARD, f"{FORWARD}.cu", "rescale(output, rescaling);", "{}", WRONG),
    "rescaled where all rows have a new maximum": (FORWARD, f"{FORWARD}.cu", "__any_sync(", "__all_sync(", WRONG),
    "values in the order of keys": (
        FORWARD, f"{FORWARD}.cu", "x[0][4 * step + r / 2 * 2 + 1]", "x[0][4 * step + (r / 2 * 2 + 2) % 4]", WRONG,
    ),
    "halves of rows change places": (FORWARD, f"{FORWARD}.cu", "2 * (r % 2);", "2 - 2 * (r % 2);", WRONG),
    "another tile's values' scale": (
        FORWARD, f"{FORWARD}.cu", "p.value.scales[tile]", "p.value.scales[tiles]", WRONG,
    ),
    "another tile's keys' scale": (FORWARD, f"{FORWARD}.cu", "p.key.scales[tile]", "p.key.scales[tiles]", WRONG),
    "keys of another head": (FORWARD, f"{FORWARD}.cu", "w.head / sizes.group", "w.head % sizes.group", WRONG),
    "the first product of a part is lost": (
        FORWARD, f"{FORWARD}.cu", "b.advanced(first * S::keys + 32 * k), k > 0)",
        "b.advanced(first * S::keys + 32 * k), k > 1)", WRONG,
    ),
    "a lift that sinks do not have": (
        FORWARD, "attention_forward.cuh", "exponential(own) * static_cast<float>(1 << lift)", "exponential(own)",
        f"{WRONG}|lse",
    ),
    "the rest is not cleared": (FORWARD, f"{FORWARD}.cu", "head < p.sizes.heads; ++head", "head < 1; ++head", WRONG),
    "no barrier before the transpose": (
        QUANTISE, f"{QUANTISE}.cu", "  __syncthreads();\n  constexpr int span", "  constexpr int span",
        "races|reads shared memory that no thread",
    ),
    "no barrier for a tile's largest": (
        QUANTISE, f"{QUANTISE}.cu", "= largest[0];\n  __syncthreads();", "= largest[0];",
        "races|reads shared memory that no thread",
    ),
    "chunks of values do not change places": (
        QUANTISE, f"{QUANTISE}.cu", "[chunk ^ row / kSide % 8]", "[chunk]", "value",
    ),
    "an infinity counts": (
        QUANTISE, f"{QUANTISE}.cu", "return magnitude <= FLT_MAX ? magnitude : 0.0f;", "return magnitude;",
        "query|key|value",
    ),
    "the largest is more than the format's": (
        QUANTISE, f"{QUANTISE}.cu", "+ 0x1fffffu) >> 23", ") >> 23", "query|key|value",
    ),
    "the last butterfly is missing": (QUANTISE, f"{QUANTISE}.cu", "lanes < D / kSide", "lanes < D / 16", "query|key"),
    "a sequence's tiles begin at its neighbour's": (
        QUANTISE, "attention_places.h", "lines, true) <= place ? low", "lines, true) < place ? low",
        "query|key|value|exceeds",
    ),
}  # fmt: skip


def try_tiles() -> None:
    x = randn(1, 2, 150, 24).bfloat16()
    x[0, 0, 5, 3] = torch.inf
    x[0, 1, 10, 5] = 1.9 * 2**9  # beyond 1.75 2^9
    for name in ("query", "key", "value"):
        assert_tiles(x, name)
        assert_tiles(x, name, torch.tensor([0, 70, 70, 140], dtype=torch.int32))


def try_attention() -> None:
    """Rings go around, tiles differ in their scales, blocks take more tiles of queries than they hold."""
    sinks = 6 * samples._Maker8.sinks(2)
    two = sample_of(70, 560, 24, heads=2, causal="bottom_right", sinks=sinks, return_lse=True)
    for i, large in ((1, 500.0), (2, 40.0)):
        two.args[i][:, :, 300] *= large
    assert_right(SDPA, two, torch.float16)
    m = samples._Maker8(1)
    m.padded("heads", 1, 8, 20, 120, 40, key_heads=2, window_size=(100, 10))
    assert_right(SDPA, m.samples[0], torch.float16)
    m.packed("packed", [40, 9], [33, 150], 2, 2, 24, spare=3)
    assert_right(VARLEN, m.samples[1], torch.float16)


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    for order in SCHEDULES:
        native.set_schedule(order, 3)
        try_tiles()
        try_attention()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 11 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path, monkeypatch):
    source, file, line, becomes, said = BREAKS[name]
    # one class of head dims compiles in a fraction of the time
    narrow = (("visit_at_least<64, 128, 256>", "visit_at_least<64>"),) if file == f"{source}.cu" else ()
    module = built_with(source, file, line, becomes, tmp_path, narrow)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_tiles() if source == QUANTISE else try_attention()
