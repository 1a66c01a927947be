"""T5's spans: the published numbers, every division alike, and texts that source and target give back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import objectives
from llmengine.data.draws import Draws, Purpose
from llmengine.objectives.span_corruption import SpanCorruption, noise_mask, partition

from .distributions import binomial, chi_square
from .numbered import document_of, numbered

SIZES = [[1], [2], [7], [30, 41], [100], [9], [1200]]


def draws(i: int) -> Draws:
    return Draws(1, i, Purpose.NOISE)


def with_sentinels(sizes, sentinels=100):
    """Documents of numbered words, and their tokenizer with sentinels at the vocabulary's end."""
    documents, tokenizer, spans = numbered(sizes)
    tokenizer.backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])
    return documents, tokenizer, spans


def test_the_published_lengths():
    options = SpanCorruption()
    assert options.longest(512) == 568
    source, target = options.lengths(np.array(568))
    assert (source, target) == (512, 114)
    assert [int(count) for count in options.counts(np.array(568))] == [85, 28]


@pytest.mark.parametrize(
    ("tokens", "density", "mean_span", "noise", "spans"),
    [
        (10, 0.15, 3.0, 2, 1),  # 1.5 is rounded to 2, 0.67 to 1
        (30, 0.15, 3.0, 4, 1),  # 4.5 is rounded to 4: halves to even
        (30, 0.25, 3.0, 8, 3),  # 7.5 to 8
        (100, 0.5, 3.0, 50, 17),
        (2, 0.9, 3.0, 1, 1),  # one token stays
        (1, 0.15, 3.0, 1, 1),  # but where there is no other
        (100, 0.9, 1.0, 90, 10),  # no more spans than tokens to part them
    ],
)
def test_rounding(tokens, density, mean_span, noise, spans):
    options = SpanCorruption(density=density, mean_span=mean_span)
    assert [int(count) for count in options.counts(np.array(tokens))] == [noise, spans]
    for i in range(30):
        mask = noise_mask(tokens, options, draws(i))
        assert mask.sum() == noise and len(mask) == tokens and mask[-1]
        assert (mask & ~np.append(False, mask[:-1])).sum() == spans


def test_every_division_is_as_likely():
    found = [tuple(partition(6, 3, draws(i)).tolist()) for i in range(8000)]
    expected = [(a, b, 6 - a - b) for a in range(1, 5) for b in range(1, 6 - a)]
    assert set(found) == set(expected) and len(expected) == 10
    chi_square([found.count(each) for each in expected], [0.1] * 10)
    assert partition(1, 1, draws(0)).tolist() == [1]


def test_places_are_missing_alike():
    """Far from the ends every token is missing with the density; the first never is, the last always."""
    masks = np.stack([noise_mask(200, SpanCorruption(), draws(i)) for i in range(4000)])
    share = masks.sum(0)
    assert share[0] == 0 and share[-1] == 4000
    for count in share[40:160]:
        binomial(count, 4000, 0.15)


def restored(source, target, sentinels, eos):
    """The text: each sentinel of the source replaced by what follows it in the target."""
    assert source[-1] == eos and target[-1] == eos
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    used = [token for token in source if token in sentinels]
    assert used == list(spans) == sentinels[: len(used)], "from the vocabulary's end downwards, in order"
    assert all(spans.values())
    return list(itertools.chain(*(spans.get(token, [token]) for token in source[:-1])))


@settings(max_examples=30)
@given(st.integers(5, 80), st.floats(0.05, 0.8), st.floats(1, 6), st.integers(0, 3))
def test_source_and_target_give_the_text(length, density, mean_span, epoch):
    documents, tokenizer, spans = with_sentinels(SIZES)
    sentinels = tokenizer.sentinel_ids
    assert sentinels == [tokenizer.vocab_size - 1 - i for i in range(100)]
    examples = objectives.build(
        "span_corruption", documents, tokenizer, sequence_length=length, seed=2, density=density, mean_span=mean_span
    )
    seen, lengths = [], examples.lengths(epoch)
    for i in range(len(examples)):
        example = examples[epoch, i]
        source, target = example["input_ids"].tolist(), example["labels"].tolist()
        assert len(source) + len(target) == lengths[i] and max(len(source), len(target)) <= length
        assert example["decoder_input_ids"].tolist() == [tokenizer.pad_id, *target[:-1]]
        text = restored(source, target, sentinels, tokenizer.eos_id)
        document_of(text, spans)
        seen += text
    assert seen == list(itertools.chain(*spans)), "every token once, in order"


@pytest.mark.parametrize("length", range(5, 70))
def test_the_longest_text_is_the_longest(length):
    for density, mean_span in ((0.15, 3.0), (0.5, 3.0), (0.5, 8.0), (0.8, 2.0)):
        options = SpanCorruption(density=density, mean_span=mean_span)
        fits = [n for n in range(1, 12 * length) if max(map(int, options.lengths(np.array(n)))) <= length]
        assert options.longest(length) == max(fits)
        assert fits == list(range(1, max(fits) + 1)), "shorter texts fit too"


def test_a_tokenizer_of_ours(novels, t5_bpe):
    assert t5_bpe.sentinel_ids == list(range(999, 899, -1)) and t5_bpe.token(999) == "<extra_id_0>"
    examples = objectives.build("span_corruption", novels, t5_bpe, sequence_length=64, seed=2)
    example = examples[0, 0]
    assert example["input_ids"][-1] == t5_bpe.eos_id and len(example["input_ids"]) <= 64
    text = restored(example["input_ids"].tolist(), example["labels"].tolist(), t5_bpe.sentinel_ids, t5_bpe.eos_id)
    assert t5_bpe.decode(text) in novels[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\), got 0.0"),
        ({"mean_span": 0.5}, "mean_span must be 1 or more, got 0.5"),
        ({"sequence_length": 4}, "'span_corruption': sequence_length must be 5 or more, got 4"),
        ({"sequence_length": 4000}, "texts of 4444 tokens have 222 spans, but the tokenizer has 100 sentinels; train"),
        ({"documents": [""]}, "'span_corruption': the documents hold no token; give more text"),
    ],
)
def test_bad_arguments(options, message, t5_bpe):
    arguments = {"documents": ["Some text."], "tokenizer": t5_bpe, "sequence_length": 16, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        objectives.build("span_corruption", **arguments)


def test_a_tokenizer_without_its_special_tokens(bpe):
    with pytest.raises(ValueError, match='no pad token; train one of kind "bpe" and family "t5"'):
        objectives.build("span_corruption", ["Some text."], bpe, sequence_length=16, seed=0)
