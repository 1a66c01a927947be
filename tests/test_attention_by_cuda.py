"""Random calls of CUDA's attention, by every GPU's kernels and by Hopper's, backward in two passes and in one: in the
simulator, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.test_attention import assert_lse
from test_attention import SETTINGS, assert_equals_oracle, packed_calls, padded_calls
from ways import Way, ways

from llmengine.functional import scaled_dot_product_attention, varlen_attention
from llmengine.testing import Sample, poison

WAYS = pytest.mark.parametrize("way, dtype", ways(only_cuda=True))
ALIGNED = {"dims": st.sampled_from([8, 16, 24, 40, 56]), "layout": st.just(torch.Tensor.clone)}  # as Hopper's want it


def assert_right(way: Way, dtype: torch.dtype, padded: Sample, packed: Sample) -> None:
    for function, call in ((scaled_dot_product_attention, padded), (varlen_attention, packed)):
        with way.asked_for(), poison():
            assert_equals_oracle(function, call, dtype, way.target, assert_lse)


@WAYS
@settings(SETTINGS, max_examples=2)
@given(padded=padded_calls(st.integers(1, 140), **ALIGNED), packed=packed_calls(2, **ALIGNED))
def test_random_calls(way, dtype, padded, packed):
    assert_right(way, dtype, padded, packed)


@pytest.mark.heavy
@WAYS
@settings(SETTINGS, max_examples=20)
@given(padded=padded_calls(st.integers(1, 300)), packed=packed_calls(4, **ALIGNED))
def test_many_random_calls(way, dtype, padded, packed):
    assert_right(way, dtype, padded, packed)
