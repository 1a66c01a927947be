"""Which tokens are predicted and what stands in their place: exact counts, and shares within binomial bounds."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import IGNORED
from llmengine.objectives.masking import Masking, Vocabulary, mask

from .distributions import binomial, chi_square

VOCABULARY, MASK = 50, 4


def masked(length, epochs, options, *, words=None, special=()):
    """(epochs, length) original ids, input ids and labels."""
    ids = np.arange(length) % (VOCABULARY - 5) + 5
    specials = np.zeros(length, bool)
    specials[list(special)] = True
    both = [
        mask(ids, specials, words, options, Vocabulary(MASK, VOCABULARY), Draws(0, epoch, Purpose.MASK))
        for epoch in range(epochs)
    ]
    inputs, labels = (np.stack(part) for part in zip(*both, strict=True))
    return np.broadcast_to(ids, inputs.shape), inputs, labels


def test_counts_and_labels_are_exact():
    for length, count in [(3, 1), (10, 2), (20, 3), (128, 19), (512, 77)]:  # round(0.15 * 10) is 2: ties go to even
        ids, inputs, labels = masked(length, 20, Masking(), special=(0, length - 1))
        chosen = labels != -100
        assert (chosen.sum(1) == min(count, length - 2)).all()
        assert (labels[chosen] == ids[chosen]).all()
        assert (inputs[~chosen] == ids[~chosen]).all()
        assert not chosen[:, [0, length - 1]].any()


def test_80_10_10():
    ids, inputs, labels = masked(128, 1500, Masking(), special=(0, 60, 127))
    chosen = labels != -100
    n = int(chosen.sum())
    random = 0.1 / VOCABULARY  # a drawn token may be [MASK], or the original
    binomial((inputs[chosen] == MASK).sum(), n, 0.8 + random)
    binomial((inputs[chosen] == ids[chosen]).sum(), n, 0.1 + random)
    drawn = inputs[chosen][(inputs[chosen] != MASK) & (inputs[chosen] != ids[chosen])]
    for token in set(range(VOCABULARY)) - {MASK}:
        # each token is drawn alike, special ones too, save where it is the original
        binomial((drawn == token).sum(), int((ids[chosen] != token).sum()), random)


def test_every_place_is_as_likely():
    _, _, labels = masked(40, 4000, Masking(), special=(0, 39))
    for count in (labels != -100).sum(0)[1:-1]:
        binomial(count, 4000, 6 / 38)


@pytest.mark.parametrize(("mask_share", "random_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_other_shares(mask_share, random_share):
    ids, inputs, labels = masked(100, 200, Masking(mask_share=mask_share, random_share=random_share))
    chosen = labels != -100
    n = int(chosen.sum())
    same = random_share / VOCABULARY
    binomial((inputs[chosen] == MASK).sum(), n, mask_share + same) if 0 < mask_share < 1 else None
    if mask_share == 1:
        assert (inputs[chosen] == MASK).all()
    if mask_share + random_share == 0:
        assert (inputs == ids).all()
    if random_share:
        binomial((inputs[chosen] == ids[chosen]).sum(), n, 1 - mask_share - random_share + same)


def test_robertas_mode():
    """The mean count is exact, counts are its two neighbours, and no special token is drawn."""
    specials = (0, 1, 2, 3, MASK, 17)
    ids = np.arange(100) % (VOCABULARY - 5) + 5
    options = Masking(mode="roberta", mask_fraction=0.153, mask_share=0.0, random_share=1.0)
    vocabulary = Vocabulary(MASK, VOCABULARY, specials)
    counts, drawn = [], []
    for epoch in range(4000):
        draws = Draws(5, epoch, Purpose.MASK)
        inputs, labels = mask(ids, np.zeros(100, bool), None, options, vocabulary, draws)
        counts.append(int((labels != IGNORED).sum()))
        drawn.append(inputs[labels != IGNORED])
    assert set(counts) == {15, 16}
    binomial(counts.count(16), 4000, 0.3)
    found = np.bincount(np.concatenate(drawn), minlength=VOCABULARY)
    assert not found[list(specials)].any()
    others = np.delete(found, specials)
    chi_square(others, np.full(len(others), 1 / len(others)))
    short = Masking(mode="roberta", mask_fraction=0.0)
    assert (masked(10, 5, short)[2] == IGNORED).all()
    assert (masked(10, 5, Masking(mode="roberta", max_predictions=1))[2] != IGNORED).sum(1).max() == 1


def test_hugging_faces_mode():
    """Every token but special ones on its own, with the fraction's probability."""
    _, inputs, labels = masked(42, 4000, Masking(mode="hf"), special=(0, 41))
    chosen = labels != IGNORED
    for count in chosen.sum(0)[1:-1]:
        binomial(count, 4000, 0.15)
    n = np.arange(41)
    shares = np.array([float(comb(40, int(k))) * 0.15**k * 0.85 ** (40 - k) for k in n])
    chi_square(np.bincount(chosen.sum(1), minlength=41)[:41], shares)
    binomial((inputs[chosen] == MASK).sum(), int(chosen.sum()), 0.8 + 0.1 / VOCABULARY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "albert"}, "mode 'albert' is not one of bert, roberta, hf"),
        ({"mode": "hf", "whole_word": True}, "token by token"),
        ({"mode": "hf", "max_predictions": 20}, "token by token"),
        ({"spans": True, "span_lengths": "poisson"}, "span_lengths 'poisson' is not one of geometric, harmonic"),
    ],
)
def test_bad_modes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Masking(**options)


def test_max_predictions():
    _, _, labels = masked(128, 5, Masking(max_predictions=7))
    assert ((labels != -100).sum(1) == 7).all()
    _, _, labels = masked(20, 5, Masking(max_predictions=7))
    assert ((labels != -100).sum(1) == 3).all()


def test_no_fraction_still_predicts_one():
    assert ((masked(50, 5, Masking(mask_fraction=0.0))[2] != -100).sum(1) == 1).all()


def test_whole_words():
    """Words of 1, 2, 3, 1, 2, 3, … tokens: all of a word or nothing of it, never more than the count."""
    length = 122
    words = np.zeros(length, bool)
    words[[0, *(start + begin for start in range(1, 121, 6) for begin in (0, 1, 3)), 121]] = True
    _, inputs, labels = masked(length, 1500, Masking(whole_word=True), words=words, special=(0, 121))
    chosen = labels != -100
    counts = chosen.sum(1)
    assert counts.max() == 18 and counts.min() >= 16
    assert counts.mean() > 17.5
    group = np.cumsum(words)
    for g in range(2, group[-1]):
        of_word = chosen[:, group == g]
        assert (of_word.all(1) == of_word.any(1)).all()
    # each token's fate is its own
    binomial((inputs[chosen] == MASK).sum(), int(chosen.sum()), 0.8 + 0.1 / VOCABULARY)


def test_a_word_does_not_reach_across_a_special_token():
    words = np.array([True, True, False, True, False, False, True])  # the second segment begins inside a word
    options = Masking(whole_word=True, mask_fraction=2 / 7)
    _, _, labels = masked(7, 50, options, words=words, special=(0, 3, 6))
    assert {tuple(np.flatnonzero(row != -100)) for row in labels} == {(1, 2), (4, 5)}


SPANS = Masking(spans=True)


@pytest.mark.parametrize(
    ("lengths", "shares"), [("geometric", 0.8 ** np.arange(1, 11)), ("harmonic", 1 / np.arange(1, 11))]
)
def test_spans_have_their_lengths(lengths, shares):
    """n words with probability proportional to 0.8 ** n, or to 1 / n, up to 10. A count of 10 leaves the first span
    whole."""
    words = np.ones(5000, bool)
    found = []
    for epoch in range(4000):
        draws = Draws(0, epoch, Purpose.MASK)
        options = Masking(spans=True, span_lengths=lengths, mask_fraction=0.002, mask_share=1.0, random_share=0.0)
        labels = mask(np.arange(5000) + 5, np.zeros(5000, bool), words, options, Vocabulary(MASK, 6000), draws)[1]
        first = int(draws_first(epoch) * 5000)  # the anchor, a word of one token
        chosen = labels != IGNORED
        assert chosen.sum() == 10 and chosen[first]
        rest = np.flatnonzero(~np.append(chosen[first:], False))
        found.append(int(rest[0]))
    # spans that touch are seldom, and 5000 tokens' end is met seldom
    chi_square(np.bincount(found, minlength=11)[1:], shares / shares.sum())


def draws_first(epoch):
    return Draws(0, epoch, Purpose.MASK).uniform(2)[1]


def test_spans_are_whole_words_of_one_fate():
    """Words of three tokens in two segments: all but the last span are whole, none crosses the special token."""
    length = 3 * 80 + 3
    special = np.zeros(length, bool)
    special[[0, 121, length - 1]] = True
    words = np.zeros(length, bool)
    words[special] = True
    words[1:121:3] = words[122:-1:3] = True
    ids = np.arange(length) + 5
    fates = 0
    n_masked = n = 0
    for epoch in range(600):
        inputs, labels = mask(ids, special, words, SPANS, Vocabulary(MASK, 10**6), Draws(2, epoch, Purpose.MASK))
        chosen = labels != IGNORED
        assert chosen.sum() == round(0.15 * length) and not (chosen & special).any()
        of_word = np.concatenate([chosen[1:121], chosen[122:-1]]).reshape(80, 3)
        assert (of_word.any(1) & ~of_word.all(1)).sum() <= 1, "only the last span is cut"
        kind = np.where(inputs == MASK, 1, np.where(inputs == ids, 2, 3))
        both = np.concatenate([kind[1:121], kind[122:-1]]).reshape(80, 3)[of_word.all(1)]
        assert (both == both[:, :1]).all(), "a span's tokens share their fate"
        fates += len(both)
        n_masked += (both[:, 0] == 1).sum()
        n += len(both)
    assert fates > 600 * 9
    assert abs(n_masked / n - 0.8) < 0.02


def test_spans_choose_every_place_alike_but_near_the_ends():
    special = np.zeros(100, bool)
    counts = np.zeros(100)
    for epoch in range(3000):
        counts += (
            mask(np.arange(100) + 5, special, ~special, SPANS, Vocabulary(MASK, 200), Draws(3, epoch, Purpose.MASK))[1]
            != IGNORED
        )
    assert counts.sum() == 3000 * 15
    middle = counts[12:]
    assert middle.max() < 1.25 * middle.min()


@given(st.integers(1, 60), st.data())
def test_any_sequence(length, data):
    special = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    words = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    fraction = data.draw(st.floats(0, 1))
    for kind in ("tokens", "words", "spans"):
        begins = None if kind == "tokens" else words
        options = Masking(mask_fraction=fraction, whole_word=kind == "words", spans=kind == "spans")
        ids = np.arange(length) + 5
        inputs, labels = mask(ids, special, begins, options, Vocabulary(MASK, 100), Draws(1, 0, Purpose.MASK))
        chosen = labels != -100
        assert chosen.sum() <= max(1, round(length * fraction)) and not (chosen & special).any()
        assert (labels[chosen] == ids[chosen]).all() and (inputs[~chosen] == ids[~chosen]).all()
        if kind != "words":
            assert chosen.sum() == min(max(1, round(length * fraction)), (~special).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_fraction": 1.5}, r"mask_fraction must be in \[0, 1\], got 1.5"),
        ({"mask_share": -0.1}, r"mask_share must be in \[0, 1\], got -0.1"),
        ({"mask_share": 0.9, "random_share": 0.2}, r"mask_share \(0.9\) and random_share \(0.2\) exceed 1 together"),
        ({"whole_word": True, "spans": True}, "give whole_word or spans, not both"),
        ({"span_p": 1.0}, r"span_p must be in \(0, 1\), got 1.0"),
        ({"longest_span": 0}, "longest_span must be 1 or more, got 0"),
        ({"max_predictions": 0}, "max_predictions must be 1 or more, or none, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Masking(**options)
