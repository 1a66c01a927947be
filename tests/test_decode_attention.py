"""Attention over a cache beyond the general laws: random calls, what may not change a bit, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmengine
from llmengine.functional import decode_attention, scaled_dot_product_attention
from llmengine.testing import Sample, all_operators, assert_law, evaluate, poison
from llmengine.testing.law import OUTPUT
from llmengine.testing.samples.decode_attention import _Maker

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
OPERATOR = next(operator for operator in all_operators() if operator.name == "decode_attention")


@st.composite
def calls(draw) -> Sample:
    m = _Maker(draw(st.integers(0, 2**31)))
    key_heads, group, rows = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    heads = key_heads * group
    lengths = draw(st.lists(st.one_of(st.integers(0, 20), st.integers(120, 300)), min_size=1, max_size=4))
    options: dict = {"window_size": (draw(st.sampled_from([-1, -1, 0, 7, 130, 400])), draw(st.sampled_from([-1, 0])))}
    options["scale"] = draw(st.sampled_from([None, 0.0, -0.3, 1.0]))
    options["softcap"] = draw(st.sampled_from([0.0, 0.0, 2.0]))
    if draw(st.booleans()):
        options["alibi_slopes"] = m.randn(*draw(st.sampled_from([(heads,), (len(lengths), heads)]))).abs() / 10
    if farthest := draw(st.sampled_from([0, 0, 3, 500])):
        options["distance_bias"] = m.randn(heads, 2 * farthest + 1)
    if draw(st.booleans()):
        options["sinks"] = m.randn(heads)
    dim, value_dim = (draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 128]))) for _ in range(2))
    page = draw(st.one_of(st.none(), st.integers(1, 70)))
    m.add("random", lengths, rows, heads, key_heads, dim, value_dim, page=page, **options)
    return m.samples[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(sample=calls())
@SETTINGS
def test_random_calls(dtype: torch.dtype, sample: Sample):
    rounded = sample.rounded(dtype)
    oracle = evaluate(OPERATOR.function, rounded.rounded(torch.float64), "reference")[0]
    plain = evaluate(OPERATOR.function, rounded, "reference")[0]
    with poison():
        ours = evaluate(OPERATOR.function, rounded, "cpu")[0]
    for y, p, o in zip(ours, plain, oracle, strict=True):
        assert_law(y, p, o, OUTPUT, str(sample.kwargs))


# ---- what may not change a bit ---------------------------------------------------------------------------------------


def cached(lengths: list[int], rows: int = 1, heads: int = 4, key_heads: int = 2, dim: int = 40):
    """Query, caches and lengths."""
    g = torch.Generator().manual_seed(len(lengths))
    query = torch.randn(len(lengths), heads, rows, dim, generator=g)
    key, value = (torch.randn(len(lengths), key_heads, max(lengths) + 5, dim, generator=g) for _ in range(2))
    return query, key, value, torch.tensor(lengths, dtype=torch.int32)


def test_a_sequence_gets_the_same_in_every_batch_and_on_every_number_of_threads():
    query, key, value, lengths = cached([700, 3, 129, 128])
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            found.append(decode_attention(query, key, value, lengths))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
    for b in range(len(lengths)):
        alone = decode_attention(*(x[b : b + 1] for x in (query, key, value, lengths)))
        assert torch.equal(alone[0], found[0][b])


def test_rows_together_get_what_they_get_one_after_another():
    query, key, value, lengths = cached([700, 40, 131], rows=7)
    together = decode_attention(query, key, value, lengths, window_size=(300, 0))
    for r in range(7):
        earlier = lengths - 6 + r
        alone = decode_attention(query[:, :, r : r + 1], key, value, earlier, window_size=(300, 0))
        assert torch.equal(alone[:, :, 0], together[:, :, r])


@pytest.mark.parametrize("size", [1, 16, 100])
def test_pages_change_no_bit(size: int):
    query, key, value, lengths = cached([700, 3, 129], rows=2)
    used = -(-key.shape[2] // size)
    order = torch.randperm(len(lengths) * used, generator=torch.Generator().manual_seed(1))

    def cut(cache: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(cache, (0, 0, 0, used * size - cache.shape[2]))
        pages = whole.transpose(1, 2).reshape(len(order), size, *cache.shape[1:2], cache.shape[3])
        return torch.empty_like(pages).index_copy(0, order, pages)

    table = order.view(len(lengths), used).int()
    paged = decode_attention(query, cut(key), cut(value), lengths, table, softcap=3.0)
    assert torch.equal(paged, decode_attention(query, key, value, lengths, softcap=3.0))


def test_the_last_rows_of_bottom_right_attention():
    query, key, value, _ = cached([300], rows=4)
    expected = scaled_dot_product_attention(
        query, key[:, :, :300], value[:, :, :300], causal="bottom_right", enable_gqa=True
    )
    torch.testing.assert_close(decode_attention(query, key, value, torch.tensor([300], dtype=torch.int32)), expected)


# ---- bad input -------------------------------------------------------------------------------------------------------

TABLE = torch.zeros(2, 3, dtype=torch.int32)
BAD = {
    "query must be a torch.Tensor, got int": {"query": 3},
    r"query has shape \(2, 4, 8\); expected four dimensions": {"query": torch.zeros(2, 4, 8)},
    "key_cache has dtype int64; allowed": {"key_cache": torch.zeros(2, 2, 9, 8, dtype=torch.int64)},
    "value_cache has dtype bfloat16 but query has float32": {"value_cache": torch.zeros(2, 2, 9, 8).bfloat16()},
    r"key_cache has shape \(3, 2, 9, 8\); expected \(2, 2, 9, 8\), \(batch, key heads": {
        "key_cache": torch.zeros(3, 2, 9, 8)
    },
    r"expected \(2, 2, 9, 8\), \(pages, page size": {"key_cache": torch.zeros(2, 2, 9, 7), "block_table": TABLE},
    r"value_cache has shape \(2, 2, 7, 8\) but key_cache has \(2, 2, 9, 8\)": {"value_cache": torch.zeros(2, 2, 7, 8)},
    "query has 4 heads, which is no multiple of the caches' 3": {
        "key_cache": torch.zeros(2, 3, 9, 8), "value_cache": torch.zeros(2, 3, 9, 8)
    },
    "query has 4 heads, which is no multiple of the caches' 9": {"block_table": TABLE},
    r"cache_lengths must be int32 of shape \(2,\) \(batch\), got int64": {"cache_lengths": torch.tensor([1, 2])},
    r"block_table must be int32 of shape \(2, 3\) .*, got int32 \(1, 3\)": {"block_table": TABLE[:1]},
    r"block_table must be int32 of shape \(2, 0\) .*, got int32 \(2,\)": {"block_table": TABLE[:, 0]},
    r"window_size is \(-1, 3\); right must be 0 or -1": {"window_size": (-1, 3)},
    "scale must be finite, got inf": {"scale": torch.inf},
    r"alibi_slopes has shape \(3,\); expected \(4,\)": {"alibi_slopes": torch.zeros(3)},
    r"sinks has shape \(2,\); expected \(4,\)": {"sinks": torch.zeros(2)},
    "cache_lengths is on meta but query is on cpu": {
        "cache_lengths": torch.zeros(2, dtype=torch.int32, device="meta")
    },
    "cache_lengths is 10 at 1; allowed: 0 to 9, the slots": {"cache_lengths": torch.tensor([9, 10]).int()},
    "cache_lengths is -1 at 0; allowed: 0 to 9": {"cache_lengths": torch.tensor([-1, 9]).int()},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_is_named(backend: str, message: str):
    arguments: dict = {
        "query": torch.zeros(2, 4, 1, 8), "key_cache": torch.zeros(2, 2, 9, 8), "value_cache": torch.zeros(2, 2, 9, 8),
        "cache_lengths": torch.tensor([9, 0], dtype=torch.int32),
    }  # fmt: skip
    with llmengine.backend(backend):
        decode_attention(**arguments)
        with pytest.raises((ValueError, TypeError), match=f"decode_attention: .*{message}"):
            decode_attention(**(arguments | BAD[message]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_that_do_not_exist_are_named_where_they_hold_tokens(backend: str):
    query, cache = torch.zeros(2, 2, 1, 8), torch.zeros(6, 4, 2, 8)
    lengths, table = torch.tensor([9, 4], dtype=torch.int32), torch.tensor([[0, 5, 6], [1, -1, 99]], dtype=torch.int32)
    with llmengine.backend(backend):
        with pytest.raises(ValueError, match=r"block_table is 6 at \(0, 2\); allowed: 0 to 5"):
            decode_attention(query, cache, cache, lengths, table)
        decode_attention(query, cache, cache, lengths - torch.tensor([1, 0], dtype=torch.int32), table)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_and_slots_before_every_window_are_not_looked_at(backend: str):
    query, key, value, lengths = cached([23], rows=2)
    pages = [x[0, :, :24].transpose(0, 1).reshape(6, 4, x.shape[1], x.shape[3]).clone() for x in (key, value)]
    table = torch.arange(6, dtype=torch.int32)[None]
    with llmengine.backend(backend):
        expected = decode_attention(query, key, value, lengths, window_size=(6, 0))
        for x in (key, value):
            x[:, :, :15] = math.nan  # rows at 21 and 22 see keys from 15 on
        for x in pages:
            x[:3], x[3, :3] = math.nan, math.nan
        table[0, :3] = torch.tensor([-1, 99, -7])
        assert torch.equal(decode_attention(query, key, value, lengths, window_size=(6, 0)), expected)
        assert torch.equal(decode_attention(query, *pages, lengths, table, window_size=(6, 0)), expected)
        with pytest.raises(ValueError, match=r"block_table is -7 at \(0, 2\)"):
            decode_attention(query, *pages, lengths, table, window_size=(10, 0))


def test_there_are_no_gradients():
    query, key, value, lengths = cached([5])
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradients, but an argument requires one"):
        decode_attention(query, key, value, lengths)
    with torch.no_grad():
        assert not decode_attention(query, key, value, lengths).requires_grad
