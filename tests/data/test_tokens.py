"""Tokenised corpora: flat arrays that lose nothing, whatever the blocks they were made in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmengine.data import tokens

DOCUMENTS = [["Emma ran home.", "", "Yes."], [" "], [], ["No, never, it is unbelievable!"], ["a b c d e f g"]]


def test_arrays(wordpiece):
    got = tokens.tokenize(DOCUMENTS, wordpiece)
    segments = ["Emma ran home.", "Yes.", "No, never, it is unbelievable!", "a b c d e f g"]
    encoded = wordpiece.encode_many(segments)
    assert got.ids.dtype == np.uint16 and got.ids.tolist() == list(itertools.chain(*encoded))
    assert np.diff(got.bounds).tolist() == list(map(len, encoded)) and got.bounds[0] == 0
    assert got.documents.tolist() == [0, 2, 3, 4], "documents without a token are left out"
    assert got.words is None


def test_ends_and_longest(wordpiece):
    got = tokens.tokenize(DOCUMENTS, wordpiece, longest=4, end=3)
    whole = tokens.tokenize(DOCUMENTS, wordpiece, end=3)
    assert np.diff(got.bounds).max() == 4
    assert got.ids.tolist() == whole.ids.tolist()
    assert set(whole.bounds) <= set(got.bounds)
    assert (whole.ids[whole.bounds[1:] - 1] == 3).all() and (whole.ids == 3).sum() == 4
    assert len(got.documents) == len(whole.documents) and got.documents[-1] == len(got.bounds) - 1


def test_words(wordpiece):
    got = tokens.tokenize(DOCUMENTS, wordpiece, words=True)
    begins = [not wordpiece.token(int(i)).startswith("##") for i in got.ids]
    assert got.words.tolist() == begins and not all(begins)
    with_end = tokens.tokenize(DOCUMENTS, wordpiece, words=True, end=3)
    assert len(with_end.words) == len(with_end.ids) and with_end.words[with_end.ids == 3].all()
    assert with_end.words[with_end.ids != 3].tolist() == begins


@pytest.mark.parametrize("block", [1, 20])
@pytest.mark.parametrize("words", [False, True])
def test_blocks_change_nothing(wordpiece, monkeypatch, block, words):
    whole = tokens.tokenize(DOCUMENTS, wordpiece, longest=3, words=words)
    monkeypatch.setattr(tokens, "BLOCK", block)
    got = tokens.tokenize(DOCUMENTS, wordpiece, longest=3, words=words)
    for name in ("ids", "bounds", "documents", "words"):
        np.testing.assert_array_equal(getattr(got, name), getattr(whole, name))
