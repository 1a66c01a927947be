"""Hopper's attention, backward (csrc/cuda/attention_sm90a_{rows,keys,wide_keys}.cu), in the simulator: the edges of its
tiles, neighbours that are not numbers, equal bits under every schedule, who takes a call, and lines broken. The samples
of all options go through it in test_attention_sm90a.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.cuda.attention import hopper_refuses
from llmengine.testing import Operator, Sample, evaluate, poison
from llmengine.testing.samples import attention
from llmengine.testing.simulator import SCHEDULES

from .harness import loaded
from .test_attention import HALVES, HEAVY, SDPA, VARLEN, assert_right, sample_of
from .test_attention_sm90a import PLACES, asked_for, broken, lined_up, ran  # noqa: F401, two of them are fixtures

BACKWARD = "attention_backward_sm90a"

# One line short of a warpgroup's lines and of a block's, and of tiles that pass (keys: 112, 80, 64, 48; rows: 96, 48,
# 32); whole ones; one more.
EDGES = [
    (64, 63, 111), (64, 64, 112), (40, 97, 113), (8, 1, 1), (64, 129, 225), (24, 95, 65),
    (72, 47, 79), (128, 48, 80), (104, 49, 81), (128, 97, 161), (96, 128, 128), (112, 33, 129),
]  # fmt: skip
MASKS: list[dict[str, Any]] = [
    {"causal": "bottom_right"}, {"is_causal": True, "dropout_p": 0.2}, {"window_size": (20, 3)}, {"scale": -0.2},
    {"softcap": 1.5, "causal": "bottom_right", "dropout_p": 0.2}, {},
]  # fmt: skip


# The same above head dims of 128 (keys: 64, 48, 32; rows: 64), of values as wide, narrower and wider; MASKS by turns.
WIDE_EDGES = [
    (192, 192, 63, 65), (256, 256, 65, 49), (192, 128, 129, 64), (136, 72, 64, 129), (256, 40, 1, 1),
    (72, 200, 127, 63), (248, 248, 66, 97), (192, 128, 33, 193),
]  # fmt: skip


@pytest.mark.parametrize("dim, rows, keys", EDGES)
@PLACES
def test_edges_of_tiles(dim: int, rows: int, keys: int, backend: str, ran: list[str]):  # noqa: F811
    number = EDGES.index((dim, rows, keys))
    for i in (number % 6, (number + 3) % 6):
        heads, key_heads = (4, 2) if rows * keys < 3000 else (2, 1)
        sample = sample_of(f"{MASKS[i]}", rows, keys, dim, heads, key_heads, return_lse=True, **MASKS[i])
        assert_right(SDPA, sample, HALVES[(i + number) % 2], backend=backend)
    assert ran.count(BACKWARD) == 2


@pytest.mark.parametrize("dim, value_dim, rows, keys", WIDE_EDGES)
@PLACES
def test_edges_of_wide_tiles(dim: int, value_dim: int, rows: int, keys: int, backend: str, ran: list[str]):  # noqa: F811
    number = WIDE_EDGES.index((dim, value_dim, rows, keys))
    options = MASKS[(number + 4) % 6]
    sample = sample_of(f"{options}", rows, keys, dim, 2, 1, value_dim=value_dim, return_lse=True, **options)
    assert_right(SDPA, sample, HALVES[number % 2], backend=backend)
    assert ran == ["attention_forward_sm90a", BACKWARD]


def wide_samples() -> list:
    """What else lies between products and probabilities, and packed sequences, in heads above 128."""
    m, alibi = attention._Maker(5), {"alibi_slopes": torch.tensor([0.25, 0.5], dtype=torch.float64)}
    m.padded("bias", 1, 2, 66, 70, 192, 128, 1, attn_mask=m.randn(2, 66, 70), softcap=2.0, return_lse=True, **alibi)
    m.padded("mask", 2, 2, 40, 65, 256, 256, 2, attn_mask=m.chance(2, 1, 1, 65), dropout_p=0.2, window_size=(50, 9))
    m.packed("packed", [70, 0, 9], [33, 5, 66], 2, 1, 192, 128, 3, dropout_p=0.2, window_size=(30, -1), **alibi)
    m.packed("packed", [9, 66], [50, 65], 2, 2, 256, 200, 2, softcap=1.5, is_causal=True, return_lse=True)
    ops = (SDPA, SDPA, VARLEN, VARLEN)
    return [pytest.param(op, s, id=f"{s.name}-{s.args[0].shape[-1]}") for op, s in zip(ops, m.samples, strict=True)]


@pytest.mark.parametrize("op, sample", wide_samples())
@PLACES
def test_options_of_wide_heads(op: Operator, sample: Sample, backend: str, ran: list[str]):  # noqa: F811
    assert_right(op, sample, HALVES[sample.args[0].shape[-1] == 192], lined_up, backend)
    assert ran == ["attention_forward_sm90a", BACKWARD]


@pytest.mark.parametrize("dim", [72, pytest.param(192, marks=HEAVY)])
def test_equal_bits_under_every_schedule_when_blocks_take_several_tiles(dim: int, ran: list[str]):  # noqa: F811
    """Three multiprocessors draw eight tiles of rows, and of keys four, or six."""
    from llmengine import _cuda_sim

    sample = sample_of("schedules", 140, 140, dim, 4, 2, value_dim=min(dim, 128), is_causal=True, dropout_p=0.3)
    given = sample.rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        with poison():
            results.append(list(evaluate(SDPA.function, given, "cuda_sim")[1].values()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert ran.count(BACKWARD) == len(SCHEDULES)


def gradients(function, tensors, upstream, *options, **named):
    given = [t.detach().requires_grad_() for t in tensors]
    with llmengine.backend("cuda_sim"), poison():
        return torch.autograd.grad(function(*given, *options, **named), given, upstream)


@pytest.mark.parametrize("dim", [32, 104, pytest.param(136, marks=HEAVY)])
def test_neighbours_that_are_not_numbers_change_nothing_in_a_packed_sequence(dim: int, ran: list[str]):  # noqa: F811
    """Boxes bring the next sequence's keys, rows and gradients along; tokens that belong to none get zeros."""
    lengths = [5, 0, 130, 33]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    spans = list(itertools.pairwise(ends.tolist()))
    g = torch.Generator().manual_seed(3)
    clean = [torch.randn(sum(lengths) + 140, 2, dim, generator=g).half() for _ in range(4)]
    for strange in (torch.nan, torch.inf):
        for odd in (0, 1):  # every other sequence is strange, and so are the tokens behind the last
            mixed = [t.clone() for t in clean]
            for first, last in [*spans[odd::2], (int(ends[-1]), None)]:
                for t in mixed:
                    t[first:last] = strange
            packed = gradients(functional.varlen_attention, mixed[:3], mixed[3], ends, ends, 130, 130, is_causal=True)
            for first, last in spans[1 - odd :: 2]:
                q, k, v, upstream = (t[first:last].transpose(0, 1) for t in clean)
                alone = gradients(functional.scaled_dot_product_attention, (q, k, v), upstream, is_causal=True)
                for found, expected in zip(packed, alone, strict=True):
                    assert torch.equal(found[first:last], expected.transpose(0, 1))
            assert not any(grad[ends[-1] :].any() for grad in packed)
    assert BACKWARD in ran


def test_keys_that_no_row_sees_and_rows_that_see_no_key_get_zeros(ran: list[str]):  # noqa: F811
    """Whole tiles of them are not looked at: there may be anything."""
    g = torch.Generator().manual_seed(4)
    for rows, keys, causal in ((200, 40, {"causal": "bottom_right"}), (40, 400, {"is_causal": True})):
        query, upstream = (torch.randn(1, 2, rows, 64, generator=g).bfloat16() for _ in range(2))
        key, value = (torch.randn(1, 2, keys, 64, generator=g).bfloat16() for _ in range(2))
        for t in (key, value):
            t[:, :, 128:] = torch.nan
        found = gradients(functional.scaled_dot_product_attention, (query, key, value), upstream, **causal)
        blind = max(0, rows - keys)
        assert not found[0][:, :, :blind].any() and found[0][:, :, blind:].any()
        assert all(grad[:, :, :40].any() and not grad[:, :, 40:].any() for grad in found[1:])
        assert all(grad.isfinite().all() for grad in found)
    assert ran.count(BACKWARD) == 2


def test_layouts_that_tensor_maps_cannot_tell_go_to_every_gpus_kernels(ran: list[str]):  # noqa: F811
    g = torch.Generator().manual_seed(6)
    good = torch.randn(1, 2, 10, 16, generator=g).half()
    odd = torch.randn(1, 2, 10, 17, generator=g).half()[..., :16]
    reason = hopper_refuses(cuda_sim.NATIVE, query=good, key=good, value=good, grad_output=odd)
    assert str(reason).startswith("grad_output: dimension 2 has a stride of 34 bytes")
    for upstream, kernel in ((odd, "attention_backward"), (good, BACKWARD)):
        found = gradients(functional.scaled_dot_product_attention, (good, good, good), upstream)
        assert all(grad.isfinite().all() for grad in found) and ran[-1] == kernel


# ---- one line broken -------------------------------------------------------------------------------------------------

ROWS, KEYS, WIDE = (f"attention_sm90a_{owner}" for owner in ("rows", "keys", "wide_keys"))
LATE = "with no mbarrier_wait between|reads shared memory that no thread|what a product of|deadlock"
UNTOLD = f"{LATE}|with no barrier between"
# kernel, line, what it becomes, what must be said: a wrong result, or what the simulator found
BREAKS = {
    "no wait for keys": (
        ROWS, "    ptx::mbarrier_wait(&shared.full[turn.stage()][0], turn.parity());\n    ptx", "    ptx", LATE,
    ),
    "no wait for rows": (KEYS, "    ptx::mbarrier_wait(&shared.full[stage][0], turn.parity());\n", "", LATE),
    "no wait for gradients": (KEYS, "    ptx::mbarrier_wait(&shared.full[stage][1], turn.parity());\n", "", LATE),
    "no wait for what is owned": (
        KEYS, "    ptx::mbarrier_wait(&shared.own_full[place], pair.parity());\n", "", LATE,
    ),
    "fetched over what passes": (
        ROWS, "  ptx::mbarrier_wait(&shared.free[stage][tile], turn.parity() ^ 1);\n", "",
        "its copy writes|phase",
    ),
    "statistics not waited for": (
        KEYS, "S::owner == Owner::keys ? 33 : 1", "1", "phase|arriv|no (mbarrier_)?wait|exceeds|no thread",
    ),
    "scores read while under way": (KEYS, "  ptx::wgmma_wait<1>(flat(x));\n", "", "accumulators of a product"),
    "keys given back while multiplied": (
        ROWS, "    ptx::wgmma_wait<1>(flat(grad_query));\n    give_back_by_warps(&shared.free[before.stage()][0]);",
        "    give_back_by_warps(&shared.free[before.stage()][0]);\n    ptx::wgmma_wait<1>(flat(grad_query));",
        "its copy writes .* what a product of|deadlock",
    ),
    "no fence before products": (KEYS, "    ptx::wgmma_fence(flat(grad_key));\n", "", "since its last wgmma_fence"),
    "neighbours stay": (ROWS, "clear_rows<panels, S::passing>(to, left);", "", "exceeds|NaN"),
    "neighbours' rows stay": (KEYS, "clear_rows<panels, S::passing>(to, left);", "", "exceeds|NaN"),
    "cleared rows not shown to the unit": (
        KEYS, "  ptx::fence_async_shared();\n  __syncwarp();\n  if (elected)", "  if (elected)",
        "with no fence_async between|races",
    ),
    "one head of a group": (KEYS, "keys ? from + group : from + 1", "from + 1", "exceeds"),
    "keys of another head": (ROWS, "keys ? head * group : head / group", "keys ? head * group : 0", "exceeds"),
    "delta of another tile": (KEYS, "shared.delta[stage],", "shared.delta[stage ^ 1],", "exceeds|no thread|between"),
    "delta is forgotten": (ROWS, "(grad[0][j][i] - statistics.delta[0][i / 2])", "grad[0][j][i]", "exceeds"),
    "dropped scores pass": (KEYS, "if (drops) drop(kept, dropped, 1.0f);", "", "exceeds"),
    "the rest is not cleared": (KEYS, "rest.key0, rest.keys,", "rest.key0, 0,", "exceeds|NaN"),
    "sums not shown to the unit": (
        ROWS, "    ptx::fence_async_shared();\n    give_back_by_warps(", "    give_back_by_warps(", "no fence_async",
    ),
    "slopes of the cap are forgotten": (ROWS, "    x[0][j][0] *= by.x, x[0][j][1] *= by.y,", "    ", "exceeds"),
    "probabilities not waited for": (
        WIDE, "  ptx::mbarrier_wait(&shared.handed_full[stage], turn.parity());", "", UNTOLD,
    ),
    "probabilities of another parity": (
        WIDE, "shared.handed_full[stage], turn.parity()", "shared.handed_full[stage], turn.parity() ^ 1", UNTOLD,
    ),
    "one warp's probabilities waited for": (
        WIDE, "ptx::mbarrier_init(&full, 4)", "ptx::mbarrier_init(&full, 1)", UNTOLD,
    ),
    "told before they are there": (
        WIDE, "  if (capped) keep_slopes",
        "  give_back_by_warps(&shared.handed_full[stage]);\n  if (capped) keep_slopes", UNTOLD,
    ),
    "probabilities over those not yet taken": (
        WIDE, "shared.handed[stage] + threadIdx.x", "shared.handed[0] + threadIdx.x", UNTOLD,
    ),
    "what is added not waited for": (
        WIDE, "    ptx::mbarrier_wait(&shared.full[before.stage()][other], before.parity());\n", "", LATE,
    ),
    "wide sums read while under way": (WIDE, "    ptx::wgmma_wait<1>(flat(x));\n", "", "accumulators of a product"),
    "given back while added": (
        WIDE, "    ptx::wgmma_wait<0>(flat(sum));\n    give_back_by_warps(&shared.free[before.stage()][other]);",
        "    give_back_by_warps(&shared.free[before.stage()][other]);\n    ptx::wgmma_wait<0>(flat(sum));",
        "its copy writes .* what a product of|deadlock",
    ),
    "dropped scores pass, in a wide head": (
        WIDE, "std::signbit(p[i]) ? 0.0f : g", "std::signbit(p[i]) ? g : g", "exceeds",
    ),
    "the cap's slopes are not handed over": (WIDE, "if (capped) slope = handed[j * 128];", "", "exceeds"),
    "sums of the other kind": (
        WIDE, "kind == values ? p.backward.grad_value : p.backward.grad_key",
        "kind == values ? p.backward.grad_key : p.backward.grad_value", "exceeds|NaN",
    ),
}  # fmt: skip


def assert_near(function, sample: Sample) -> None:
    """Gradients in float16, with a margin that none of the breaks keeps."""
    given = sample.rounded(torch.float16, lined_up)
    oracle = evaluate(function, given.rounded(torch.float64), "reference")[1]
    with poison():
        found = evaluate(function, given, "cuda_sim")[1]
    for name, expected in oracle.items():
        assert found[name].isfinite().all(), f"{name}: NaN"
        error, most = ((x.double()).abs().max() for x in (found[name] - expected, expected))
        assert error <= 0.01 * most, f"{name} exceeds"


def try_attention() -> None:
    assert_near(SDPA.function, sample_of("heads", 130, 200, 24, 4, 2, causal="bottom_right", dropout_p=0.2))
    assert_near(SDPA.function, sample_of("more tiles than blocks", 150, 130, 40, 8, 8, window_size=(100, 10)))
    assert_near(SDPA.function, sample_of("capped", 20, 130, 16, softcap=1.0, scale=2.0))
    assert_near(VARLEN.function, packed(24))


def try_wide_attention() -> None:
    options = {"causal": "bottom_right", "softcap": 1.0, "scale": 1.0, "dropout_p": 0.2}
    assert_near(SDPA.function, sample_of("capped", 200, 210, 136, 2, 1, value_dim=104, **options))
    assert_near(VARLEN.function, packed(136))


def packed(dim: int) -> Sample:
    m = attention._Maker(1)
    m.packed("packed", [40, 9], [33, 150], 2, 2, dim, spare=3)
    for x in m.samples[0].args[:3]:
        x[-3:] = torch.nan  # tokens of no sequence
    return m.samples[0]


def test_whole_kernels_pass_what_broken_ones_must_fail():
    try_attention()
    try_wide_attention()


CLASSES = {  # one compiles in a fraction of the time
    ROWS: ("visit_hopper<64, 96, 128, 192, 256>", "visit_hopper<64>"),
    KEYS: ("visit_hopper<64, 96, 128>", "visit_hopper<64>"),
    WIDE: ("visit_hopper<192, 256>", "visit_hopper<192>"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 8 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    kernel, line, becomes, said = BREAKS[name]
    module = broken(kernel, (line, becomes), CLASSES[kernel], tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_wide_attention() if kernel == WIDE else try_attention()
