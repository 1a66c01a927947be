"""Padding masks, boolean and the same for all rows and heads, on Hopper's kernels in the simulator
(csrc/cuda/attention_sm90a_padding.cu, attention_sm90a.cuh): the samples' law for masks of every shape of padding, tiles
of hidden keys that nobody looks at, who takes a mask, and lines broken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.cuda.native import ATTENTION, ATTENTION_BACKWARD, Native
from llmengine.testing import Sample, evaluate, poison
from llmengine.testing.samples import attention

from .harness import loaded, schedule
from .test_attention import HALVES, HEAVY, SDPA, assert_right
from .test_attention_sm90a import broken, lined_up
from .test_attention_sm90a_backward import gradients


@pytest.fixture(autouse=True)
def asked_for(request, monkeypatch):
    schedule(request)
    monkeypatch.setenv(ATTENTION, "sm90a")


@pytest.fixture
def spans(monkeypatch) -> list[tuple[str, list[list[int]] | None]]:
    """Kernels that ran, and from where to where they found keys."""
    found: list[tuple[str, list[list[int]] | None]] = []
    call = Native.call

    def noted(self, kernel, on, **arguments):
        call(self, kernel, on, **arguments)
        room = arguments.get("spans")
        found.append((kernel, None if room is None else room.tolist()))

    monkeypatch.setattr(Native, "call", noted)
    return found


KEYS = 300


def mask_of(*seen: range | list[int]) -> Tensor:
    mask = torch.zeros(len(seen), 1, 1, KEYS, dtype=torch.bool)
    for line, keys in zip(mask, seen, strict=True):
        line[..., list(keys)] = True
    return mask


MASKS: dict[str, tuple[Tensor, list[list[int]]]] = {
    "behind": (mask_of(range(129), range(300)), [[0, 129], [0, 300]]),
    "before": (mask_of(range(250, 300), range(128, 256)), [[250, 300], [128, 256]]),
    "between": (mask_of(range(5, 280, 3), [17, 150]), [[5, 279], [17, 151]]),
    "all": (mask_of([], range(3, 40)), [[0, 0], [3, 40]]),
    "shared": (mask_of(range(10, 140)), [[10, 140]]),
}
OPTIONS: list[dict[str, Any]] = [
    {}, {"is_causal": True, "dropout_p": 0.2}, {"softcap": 1.5, "return_lse": True}, {"causal": "bottom_right"},
    {"window_size": (40, 60), "return_lse": True},
]  # fmt: skip


def padded(name: str, mask: Tensor, dim: int, rows: int = 70, **options: Any) -> Sample:
    m = attention._Maker(dim + rows)
    m.padded(name, 2, 2, rows, KEYS, dim, key_heads=1, attn_mask=mask, **options)
    return m.samples[0]


# One pass takes head dims up to 128.
CASES = [
    *(
        pytest.param(name, dim, passes, marks=() if dim == 40 else HEAVY)
        for name in MASKS
        for dim in (40, 72, 104)
        for passes in ("two_pass", "one_pass")
    ),
    *(pytest.param(name, 136, "two_pass", marks=() if name == "between" else HEAVY) for name in MASKS),
]


@pytest.mark.parametrize("name, dim, passes", CASES)
def test_padding_of_all_kinds(name: str, dim: int, passes: str, spans, monkeypatch):
    monkeypatch.setenv(ATTENTION_BACKWARD, passes)
    number = list(MASKS).index(name)
    mask, expected = MASKS[name]
    sample = padded(name, mask, dim, **OPTIONS[number])
    assert_right(SDPA, sample, HALVES[number % 2])
    assert [found for _, found in spans] == [expected] * 2


@pytest.mark.parametrize("with_bias", ["alibi_slopes", "distance_bias"])
def test_padding_beside_a_bias(with_bias: str, spans):
    m = attention._Maker(3)
    bias = m.randn(2).abs() if with_bias == "alibi_slopes" else m.table(2, 9)
    assert_right(SDPA, padded("beside", MASKS["between"][0], 24, **{with_bias: bias}), HALVES[1])
    assert [found for _, found in spans] == [MASKS["between"][1]] * 2


@pytest.mark.parametrize("passes", ["two_pass", "one_pass"])
def test_tiles_of_hidden_keys_are_not_looked_at(passes: str, spans, monkeypatch):
    """There may be anything: 128 of them are a tile's, wherever it begins."""
    monkeypatch.setenv(ATTENTION_BACKWARD, passes)
    g = torch.Generator().manual_seed(1)
    query, upstream = (torch.randn(1, 2, 140, 64, generator=g).half() for _ in range(2))
    key, value = (torch.randn(1, 2, 560, 64, generator=g).half() for _ in range(2))
    mask = torch.zeros(1, 1, 1, 560, dtype=torch.bool)
    mask[..., 256:384] = True
    mask[..., 300] = False
    clean = gradients(functional.scaled_dot_product_attention, (query, key, value), upstream, mask)
    for t in (key, value):
        t[:, :, :128] = t[:, :, 512:] = torch.nan
    found = gradients(functional.scaled_dot_product_attention, (query, key, value), upstream, mask)
    for ours, same in zip(found, clean, strict=True):
        assert torch.equal(ours, same)
    for grad in found[1:]:
        assert grad[:, :, 256:300].any() and not grad[:, :, :256].any() and not grad[:, :, 384:].any()
        assert not grad[:, :, 300].any()
    assert {str(x) for _, x in spans} == {"[[256, 384]]"}


def test_rows_that_padding_leaves_without_keys_are_zero_whatever_lies_there():
    g = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 2, 40, 64, generator=g).bfloat16() for _ in range(3))
    key[1], value[1] = torch.nan, torch.nan
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1] = False
    upstream = torch.ones_like(query)
    sinks = torch.tensor([0.5, -1.0])
    for options in ({}, {"sinks": sinks}):
        with llmengine.backend("cuda_sim"), poison():
            y, lse = functional.scaled_dot_product_attention(query, key, value, mask, return_lse=True, **options)
        assert y[0].any() and not y[1].any()
        expected = sinks[:, None] if options else torch.tensor(-torch.inf)
        assert torch.equal(lse[1], expected.expand_as(lse[1]))
    for grad in gradients(functional.scaled_dot_product_attention, (query, key, value), upstream, mask):
        assert grad.isfinite().all() and grad[0].any() and not grad[1].any()


def test_a_mask_that_is_expanded_to_heads_and_rows_is_padding(spans):
    """As Transformers hands it over."""
    mask, expected = MASKS["behind"]
    assert_right(SDPA, padded("expanded", mask.expand(2, 2, 20, KEYS), 24, 20), HALVES[0])
    assert [found for _, found in spans] == [expected] * 2


def test_other_masks_are_the_logits_own(spans):
    """A head's own, a row's own, one of floats: as ever."""
    m = attention._Maker(4)
    for mask in (m.chance(2, 2, 1, KEYS), m.chance(2, 1, 20, KEYS), m.randn(2, 1, 1, KEYS), m.chance(2, 1, 20, 1)):
        assert_right(SDPA, padded("another", mask, 24, 20), HALVES[0])
    assert {found for _, found in spans} == {None}


# ---- one line broken -------------------------------------------------------------------------------------------------

FORWARD, KEYS_OWN, SEEN = (f"attention_sm90a_{name}" for name in ("forward", "keys", "padding"))
NARROW = {
    FORWARD: ("visit_pairs_of_dims<64, 96, 128, 192, 256>", "visit_pairs_of_dims<64>"),
    KEYS_OWN: ("visit_hopper<64, 96, 128>", "visit_hopper<64>"),
    SEEN: ("", ""),
}
# kernel, line, what it becomes, what must be said: a wrong result, or what the simulator found
BREAKS = {
    "hidden keys stay": (
        FORWARD, "  if (p.seen.keys) hide_padding(x, p.seen, w.s, key);\n", "", "exceeds",
    ),
    "a lane reads its neighbour's key": (FORWARD, "first + 32 * w + lane_of()", "first + 32 * w", "exceeds"),
    "bits of other keys": (FORWARD, "(8 * (j % 4) + lane_of()", "(8 * (j % 2) + lane_of()", "exceeds"),
    "the span of another sequence": (FORWARD, "(seen.batch ? 2 * s.batch : 0)", "0", "exceeds"),
    "eight keys for sixteen": (
        KEYS_OWN, "first + 8 * half + lane_of() / 4", "first + lane_of() / 4", "exceeds",
    ),
    "keys are hidden that are not": (KEYS_OWN, "own.begin < own.end ? span", "own.begin > own.end ? span", "exceeds"),
    "the first key is lost": (SEEN, "largest(behind, keys - key)", "largest(behind, keys - key - 1)", "exceeds"),
    "the last key is lost": (SEEN, "last = key + 1;", "last = key;", "exceeds"),
    "warps not waited for": (SEEN, "  __syncthreads();\n", "", "with no barrier|races|no thread"),
    "one warp's keys": (
        SEEN, "for (const auto& of_warp : of_warps)", "for (const auto& of_warp : {of_warps[1]})", "exceeds",
    ),
}  # fmt: skip


def try_padding() -> None:
    """A tile's last key is seen alone, and another one's first."""
    mask = mask_of([*range(50, 129, 2), 128], [127, *range(130, 300)])
    given = padded("broken", mask, 24, 40).rounded(torch.float16, lined_up)
    oracle = evaluate(SDPA.function, given.rounded(torch.float64), "reference")
    with poison():
        found = evaluate(SDPA.function, given, "cuda_sim")
    assert torch.allclose(found[0][0].double(), oracle[0][0], atol=4e-3), "output exceeds"
    for name, expected in oracle[1].items():
        error, most = ((x.double()).abs().max() for x in (found[1][name] - expected, expected))
        assert error <= 0.01 * most, f"{name} exceeds"


def test_whole_kernels_pass_what_broken_ones_must_fail():
    try_padding()


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 5 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    kernel, line, becomes, said = BREAKS[name]
    module = broken(kernel, (line, becomes), NARROW[kernel], tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_padding()
