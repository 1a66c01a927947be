"""BART's noise: every operation's counts and distributions, and what the model is given."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import objectives
from llmengine.data.draws import Draws, Purpose
from llmengine.objectives.noise import Noise, Replacing, add_noise, infilled, inserted, permuted, span_lengths

from .distributions import binomial, chi_square
from .numbered import document_of, numbered

MASK, VOCABULARY = 4, 10**6
MASKS_ONLY = Replacing(MASK, VOCABULARY, 0.0)
QUIET = {"permute_fraction": 0.0, "mask_fraction": 0.0}
SIZES = [[1], [2], [7], [30, 41], [100], [9], [300]]


def draws(i: int) -> Draws:
    return Draws(1, i, Purpose.NOISE)


def noisy(length: int, trials: int, words=None, stops=None, **options) -> list[np.ndarray]:
    """A text 10, 11, 12, … under noise, many times."""
    words = np.ones(length, bool) if words is None else words
    stops = np.zeros(length, bool) if stops is None else stops
    ids, options = np.arange(length) + 10, Noise(**{**QUIET, **options})
    return [add_noise(ids, words, stops, options, MASK, VOCABULARY, draws(i)) for i in range(trials)]


# ---- sentences -------------------------------------------------------------------------------------------------------


def test_sentences_take_every_order_alike():
    stops = np.array([0, 1, 0, 0, 1, 1, 0], bool)  # 0 1 | 2 3 4 5 | 6
    orders = [tuple(permuted(stops, 1.0, draws(i)).tolist()) for i in range(6000)]
    parts = [(0, 1), (2, 3, 4, 5), (6,)]
    expected = [tuple(itertools.chain(*order)) for order in itertools.permutations(parts)]
    assert set(orders) == set(expected)
    chi_square([orders.count(order) for order in expected], [1 / 6] * 6)


def test_a_fraction_of_the_sentences_moves():
    stops = np.ones(40, bool)
    stops[::2] = False  # 20 sentences of 2 tokens
    for i in range(50):
        order = permuted(stops, 0.25, draws(i))
        assert sorted(order.tolist()) == list(range(40))
        assert (order[1::2] == order[::2] + 1).all(), "sentences stay whole"
        assert (order != np.arange(40)).sum() <= 2 * 5
    assert (permuted(stops, 0.0, draws(0)) == np.arange(40)).all()


# ---- text infilling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.5, 3.0])
def test_span_lengths_are_poissons(mean):
    """All but the last, which is cut: the budget is met exactly."""
    lengths = [span_lengths(5000, mean, draws(i)) for i in range(20)]
    assert all(each.sum() == 5000 for each in lengths)
    counts = np.bincount(np.concatenate([each[:-1] for each in lengths]))
    shares = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(len(counts))]
    chi_square(counts, shares)


def test_the_last_span_is_cut():
    for budget in range(1, 12):
        for i in range(200):
            lengths = span_lengths(budget, 3.0, draws(i))
            assert lengths.sum() == budget and lengths[-1] > 0 and lengths.min() >= 0
    assert len(span_lengths(0, 3.0, draws(0))) == 0
    assert (span_lengths(7, 0, draws(0)) == 1).all()


def test_infilling():
    """Words of two tokens: spans begin and end at words, and what is left is the text in order."""
    words = np.tile([True, False], 100)
    covered, masks, firsts = 0, 0, np.zeros(100, np.int64)
    trials = 400
    for text in noisy(200, trials, words, mask_fraction=0.3, random_share=0.0):
        kept = text[text != MASK] - 10
        assert (np.diff(kept) > 0).all() and (kept[::2] % 2 == 0).all() and (kept[1::2] == kept[::2] + 1).all()
        covered += 100 - len(kept) // 2
        masks += len(text) - len(kept)
        firsts[np.setdiff1d(np.arange(100), kept[::2] // 2)] += 1
    # spans overlap, and the text's end cuts some: fewer than the budget of 30 words, but not by much
    assert 0.7 * 30 * trials < covered <= 30 * trials
    # about 10 spans with a mask each, 0.05 of them insertions, less those that begin inside another
    assert 7 < masks / trials < 10.6
    assert firsts[10:90].max() < 1.4 * firsts[10:90].min(), "every word is covered as often"


def test_a_span_that_begins_inside_another_has_no_mask_of_its_own():
    """By brute force: cover words one by one, and see which begins are reached by another span."""
    for i in range(300):
        options = Noise(mask_fraction=0.6, random_share=0.0)
        text = infilled(np.arange(30) + 10, np.ones(30, bool), options, MASKS_ONLY, draws(i))
        replay = draws(i)
        lengths = span_lengths(18, 3.0, replay)
        spans = lengths[lengths > 0]
        begins = replay.order(30)[: len(spans)].tolist()
        inside = {w for b, n in zip(begins, spans.tolist(), strict=True) for w in range(b + 1, min(b + n, 30))}
        masks = len(set(begins) - inside) + int((lengths == 0).sum())
        kept = sorted(set(range(30)) - inside - set(begins))
        assert text[text != MASK].tolist() == [w + 10 for w in kept]
        assert (text == MASK).sum() == min(masks, 30 - len(kept))


@pytest.mark.parametrize("replace_by", ["mask", "masks", "nothing"])
def test_token_masking_is_exact(replace_by):
    for text in noisy(50, 100, mask_fraction=0.15, mean_span=0.0, random_share=0.0, replace_by=replace_by):
        hidden = (text == MASK).sum()
        assert (hidden, len(text)) == ((0, 42) if replace_by == "nothing" else (8, 50))


def test_masks_for_each_token():
    words = np.tile([True, False, False], 30)
    for text in noisy(90, 50, words, mask_fraction=0.3, random_share=0.0, replace_by="masks"):
        text = text[: 90 + 20]
        assert (text == MASK).sum() >= 3 and len(text) == 90, "insertions have no room where nothing is left out"
        assert all(len(set((text[i : i + 3] == MASK).tolist())) == 1 for i in range(0, 90, 3))


def test_random_tokens():
    texts = noisy(100, 500, mask_fraction=0.3, random_share=0.1, mean_span=0.0)
    hidden = np.concatenate([text[text != np.arange(100) + 10] for text in texts])
    binomial((hidden != MASK).sum(), len(hidden), 0.1)
    drawn = hidden[hidden != MASK]
    chi_square(np.bincount(drawn * 10 // VOCABULARY, minlength=10), [0.1] * 10)


# ---- deletion, insertion, rotation -----------------------------------------------------------------------------------


def test_deletion():
    left = np.zeros(20, np.int64)
    for text in noisy(20, 2000, delete_fraction=0.25):
        assert len(text) == 15 and (np.diff(text) > 0).all()
        left[text - 10] += 1
    for count in left:
        binomial(count, 2000, 0.75)


def test_insertion():
    places = np.zeros(13, np.int64)
    for i in range(2000):
        text = inserted(np.arange(10), 3, Replacing(-1, 5, 0.0), draws(i))
        assert text[text >= 0].tolist() == list(range(10)) and len(text) == 13
        places[text < 0] += 1
    for count in places:
        binomial(count, 2000, 3 / 13)
    assert {len(text) for text in noisy(30, 5, insert_fraction=0.1)} == {33}


def test_rotation():
    texts = noisy(8, 4000, rotate_share=1.0)
    assert all((np.roll(text, text[0] - 10) == np.arange(8) + 10).all() for text in texts)
    chi_square(np.bincount([text[0] - 10 for text in texts]), [1 / 8] * 8)
    binomial(sum(text[0] != 10 for text in noisy(8, 2000, rotate_share=0.5)), 2000, 0.5 * 7 / 8)


# ---- examples --------------------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {
        "permute_fraction": st.floats(0, 1), "mask_fraction": st.floats(0, 1),
        "mean_span": st.sampled_from([0.0, 0.3, 3.0, 10.0]), "random_share": st.floats(0, 1),
        "replace_by": st.sampled_from(["mask", "masks", "nothing"]),
        "delete_fraction": st.floats(0, 1), "insert_fraction": st.floats(0, 1),
        "rotate_share": st.floats(0, 1), "whole_word": st.booleans(),
    }
)  # fmt: skip


def with_bos(tokenizer):
    tokenizer.roles["bos_token"] = "[CLS]"
    return tokenizer


@settings(max_examples=40)
@given(OPTIONS, st.integers(4, 40), st.integers(0, 3))
def test_any_options(options, length, epoch):
    documents, tokenizer, spans = numbered(SIZES)
    tokenizer = with_bos(tokenizer)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    examples = objectives.build("denoising", documents, tokenizer, sequence_length=length, seed=2, **options)
    seen, most = [], examples.lengths(epoch)
    for i in range(len(examples)):
        example = examples[epoch, i]
        source, target = example["input_ids"].tolist(), example["labels"].tolist()
        assert example["decoder_input_ids"].tolist() == [eos, *target[:-1]]
        for side in (source, target):
            assert side[0] == bos and side[-1] == eos and len(side) <= max(length, 4)
        assert len(source) + len(target) <= most[i]
        document_of(target[1:-1], spans)
        seen += target[1:-1]
    assert seen == list(itertools.chain(*spans)), "every token once, in order"


def test_the_defaults_are_barts(novels, bart_bpe):
    """Of real text: about three tenths of the words are hidden, sentences are permuted, and nothing grows."""
    examples = objectives.build("denoising", novels, bart_bpe, sequence_length=128, seed=2)
    assert (examples.heads, examples.architecture) == (("seq2seq",), "encoder_decoder")
    shares, same_start, n = [], 0, 100
    for i in range(n):
        source, target = examples[0, i]["input_ids"], examples[0, i]["labels"]
        assert len(source) <= len(target)
        common = torch.bincount(source, minlength=1000).minimum(torch.bincount(target, minlength=1000)).sum()
        shares.append(1 - (common - 2) / (len(target) - 2))
        same_start += bool((source[:6] == target[:6]).all())
    assert 0.2 < np.mean(shares) < 0.33
    assert same_start < 0.5 * n
    start = objectives.build("denoising", novels, bart_bpe, sequence_length=128, seed=2, decoder_start="bos")[0, 3]
    assert start["decoder_input_ids"][0] == bart_bpe.bos_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_fraction": 1.1}, r"mask_fraction must be in \[0, 1\], got 1.1"),
        ({"mean_span": -1.0}, r"mean_span must be 0, or in \[0.1, 100\], got -1.0"),
        ({"replace_by": "words"}, "replace_by must be one of mask, masks, nothing, got 'words'"),
        ({"decoder_start": "pad"}, "decoder_start must be bos or eos, got 'pad'"),
        ({"sequence_length": 3}, "'denoising': sequence_length must be 4 or more, got 3"),
        ({"documents": [""]}, "'denoising': the documents hold no token; give more text"),
        ({"span": 3}, "'denoising': no option span; options: permute_fraction, "),
    ],
)
def test_bad_arguments(options, message, bart_bpe):
    arguments = {"documents": ["Some text."], "tokenizer": bart_bpe, "sequence_length": 16, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        objectives.build("denoising", **arguments)


def test_a_tokenizer_without_its_special_tokens(bpe):
    with pytest.raises(ValueError, match='no mask token; train one of kind "bpe" and family "bart"'):
        objectives.build("denoising", ["Some text."], bpe, sequence_length=16, seed=0)
