"""CUDA attention over a cache (csrc/cuda/decode_attention.cu) in the simulator: samples, splits, equal bits under every
schedule, numbers that no kernel may follow, refusals, and kernels with one line broken.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llmengine
from llmengine.backends import cuda_sim
from llmengine.functional import decode_attention
from llmengine.testing import Sample, all_operators, assert_law, evaluate, poison
from llmengine.testing.law import OUTPUT
from llmengine.testing.samples.decode_attention import _Maker
from llmengine.testing.simulator import SCHEDULES

from .harness import built_with, device_of, loaded, places, schedule
from .test_attention import BY_SM80, assert_lse

OPERATOR = next(operator for operator in all_operators() if operator.name == "decode_attention")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)


def assert_right(sample: Sample, dtype: torch.dtype, backend: str = "cuda_sim") -> None:
    given = sample.on(device_of(backend)).rounded(dtype)
    oracle = evaluate(OPERATOR.function, given.rounded(torch.float64), "reference")[0]
    plain = evaluate(OPERATOR.plain or OPERATOR.function, given, None)[0]
    with poison():
        ours = evaluate(OPERATOR.function, given, backend)[0]
    assert_law(ours[0], plain[0], oracle[0], OUTPUT, f"{sample.name} {dtype}: output")
    if len(ours) > 1:
        assert_lse(*(outputs[1].double() for outputs in (ours, plain, oracle)))


def sample_of(name: str, *sizes, **options) -> Sample:
    m = _Maker(len(name))
    m.add(name, *sizes, **options)
    return m.samples[0]


@pytest.mark.parametrize(
    "sample, dtype",
    [
        pytest.param(s, HALVES[i.bit_count() % 2], id=s.name, marks=[pytest.mark.heavy] * (i % 3 > 0))
        for i, s in enumerate(OPERATOR.samples())
    ],
)
@pytest.mark.parametrize("backend", places(), ids=BY_SM80)
def test_samples_of_all_options(sample: Sample, dtype: torch.dtype, backend: str):
    assert_right(sample, dtype, backend)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", [[15, 16, 17], [63, 64, 65, 0], [190, 400]], ids=str)
@pytest.mark.parametrize("backend", places(), ids=BY_SM80)
def test_edges_of_steps_rounds_and_shares(lengths: list[int], dim: int, backend: str):
    """In every class of head dims; of one or two sequences the simulator's three multiprocessors share the keys."""
    m = _Maker(dim)
    m.add("edges", lengths, 3, 6, 1, dim - 8 * (len(lengths) == 3), capacity=max(lengths) + 64, sinks=m.randn(6))
    m.add("pages", lengths, 1, 2, 2, dim, page=32, window_size=(150, -1))
    for sample, dtype in zip(m.samples, HALVES, strict=True):
        assert_right(sample, dtype, backend)


def test_rows_that_begin_anywhere():
    """Odd addresses and strides, tokens before heads, keys that all sequences share."""
    g = torch.Generator().manual_seed(2)
    query = torch.randn(2, 3, 4, 41, generator=g).half()[..., 1:].transpose(1, 2)
    key = torch.randn(30, 2, 43, generator=g).half()[..., 1:41].transpose(0, 1).expand(2, 2, 30, 40)
    value = torch.randn(2, 2, 30, 48, generator=g).half()[..., 8:48]
    lengths = torch.tensor([30, 21], dtype=torch.int32)
    with llmengine.backend("cuda_sim"), poison():
        found, expected = (
            decode_attention(*tensors, lengths)
            for tensors in ((query, key, value), [t.contiguous() for t in (query, key, value)])
        )
    assert torch.equal(found, expected)


def test_equal_bits_under_every_schedule():
    from llmengine import _cuda_sim

    given = sample_of("schedules", [390], 2, 4, 2, 64, page=48, softcap=4.0).rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 11)
        results.append(evaluate(OPERATOR.function, given, "cuda_sim")[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_wrong_numbers_stay_within_the_caches():
    """A kernel cannot refuse them: the nearest length and page are taken, and nothing else is read."""
    g = torch.Generator().manual_seed(5)
    query, cache = torch.randn(3, 2, 1, 16, generator=g).half(), torch.randn(4, 8, 2, 16, generator=g).half()
    lengths = torch.tensor([17, -3, 16], dtype=torch.int32)
    table = torch.tensor([[0, 1], [2, 3], [9, -1]], dtype=torch.int32)
    with llmengine.backend("cuda_sim"), poison():
        wrong = decode_attention(query, cache, cache, lengths, table)
        right = decode_attention(query, cache, cache, lengths.clamp(0, 16), table.clamp(0, 3))
    assert torch.equal(wrong, right) and not right[1].any()


def test_what_is_not_supported_names_itself():
    lengths = torch.tensor([3], dtype=torch.int32)
    with llmengine.backend("cuda_sim"):
        for shape, dtype, message in (
            ((1, 2, 8, 16), torch.float32, "multiplies bfloat16 and float16, got float32"),
            ((1, 2, 8, 264), torch.float16, "head dims up to 256, got 264"),
        ):
            x = torch.zeros(shape, dtype=dtype)
            with pytest.raises(RuntimeError, match=message):
                decode_attention(x, x, x, lengths)


# ---- one line broken -------------------------------------------------------------------------------------------------

# (line, what it becomes, what must be said): a wrong result, or what the simulator found.
BREAKS = {
    "a stage is not waited for": ("ptx::wait_copies<1>();", "", "races: .* what a copy"),
    "no barrier before a stage": ("__syncwarp();  // this stage", "//", "races"),
    "no barrier after a stage": ("__syncwarp();  // every lane", "//", "races"),
    "stages are mixed up": ("begin_stage(stage ^ 1, key", "begin_stage(stage, key", "races"),
    "no barrier before the query": ("  }\n  __syncthreads();\n", "  }\n", "races"),
    "no barrier before parts": ("__syncthreads();  // every warp", "//", "races"),
    "no barrier behind parts": ("__syncthreads();  // all parts", "//", "races"),
    "a key too many": ("key < end ? wide : 0", "key <= end ? wide : 0", "exceeds|past the end|NaN"),
    "slots without a token": ("seen = back >= 0", "seen = back >= -1", "exceeds|differs"),
    "a window too wide": ("back <= o.left", "back <= o.left + 1", "exceeds"),
    "a window too narrow": ("share_of(length, p.rows, p", "share_of(length, 1, p", "exceeds"),
    "pages of another sequence": ("static_cast<int64_t>(b) * of_sequence", "0", "exceeds|differs"),
    "keys of another head": ("head * cache.steps.head", "0 * cache.steps.head", "exceeds"),
    "rows of another head": ("key_head * p.group + i / p.rows", "key_head + i / p.rows", "exceeds|races"),
    "sums are not rescaled": ("rescale(output, rescaling);", "", "exceeds"),
    "a share is left out": ("sum = fmaf(part[1], weight, sum);", "sum = part[1];", "exceeds"),
    "shares meet at another place": ("const int64_t place = share *", "const int64_t place = 0 *", "races"),
    "sinks in every share": (
        "whole ? sink_of(p.options, row.head) : -INFINITY",
        "sink_of(p.options, row.head)",
        "exceeds",
    ),
    "pages are not clamped": ("least(largest(page, 0), count - 1)", "page", "past the end|before|outside|no memory"),
}


def try_decoding() -> None:
    m = _Maker(1)
    m.add("shares", [390, 130], 2, 4, 2, 24, window_size=(330, -1), sinks=m.randn(4))
    m.add("pages", [70, 33, 9, 64], 3, 4, 2, 16, page=16, window_size=(40, 0))
    for sample, dtype in zip(m.samples, HALVES, strict=True):
        assert_right(sample, dtype)
    test_wrong_numbers_stay_within_the_caches()


def test_whole_kernels_pass_what_broken_ones_must_fail():
    try_decoding()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (i % 4 > 0)) for i, n in enumerate(BREAKS)]
)
def test_a_broken_line_is_caught(name: str, tmp_path: Path, monkeypatch):
    line, broken, said = BREAKS[name]
    module = built_with("decode_attention", "decode_attention.cu", line, broken, tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_decoding()
