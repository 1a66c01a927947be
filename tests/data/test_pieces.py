"""Parts of arrays as one: every slice is what joining them gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data.pieces import Pieces

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def arrays_of(sizes: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end, dtype=np.uint16) for size, end in zip(sizes, ends, strict=True)]


@given(SIZES, st.integers(-40, 40), st.integers(-40, 40))
def test_slices(sizes, begin, end):
    arrays = arrays_of(sizes)
    pieces, whole = Pieces(arrays), np.concatenate(arrays)
    assert len(pieces) == len(whole) and pieces.dtype == np.uint16
    got = pieces[begin:end]
    assert isinstance(got, np.ndarray) and got.dtype == np.uint16
    np.testing.assert_array_equal(got, whole[begin:end])
    np.testing.assert_array_equal(np.asarray(pieces), whole)


@given(SIZES, st.data())
def test_parts_of_parts(sizes, data):
    arrays = arrays_of(sizes)
    pieces, whole = Pieces(arrays), np.concatenate(arrays)
    for _ in range(2):
        at = st.integers(0, len(whole))
        ranges = [sorted(pair) for pair in data.draw(st.lists(st.tuples(at, at), max_size=4))]
        pieces = pieces.take(np.array(ranges, np.int64).reshape(-1, 2))
        whole = np.concatenate([whole[:0], *(whole[a:b] for a, b in ranges)])
        np.testing.assert_array_equal(pieces[:], whole)
        assert len(pieces) == len(whole)


def test_a_slice_within_one_array_is_not_copied():
    arrays = arrays_of([5, 5])
    pieces = Pieces(arrays).take(np.array([[1, 4], [6, 9]]))
    assert np.shares_memory(pieces[3:6], arrays[1]) and not np.shares_memory(pieces[2:4], arrays[1])
    with pytest.raises(ValueError, match="slices have no step, got 2"):
        pieces[::2]
