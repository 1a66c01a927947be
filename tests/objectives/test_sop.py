"""Sentence order: two consecutive segments of one document, half of the time swapped, and nothing is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import objectives

from .distributions import binomial
from .numbered import document_of, numbered

SIZES = np.random.default_rng(0).integers(1, 20, (6, 400)).tolist()


def parts(example, tokenizer):
    """The segments in the text's order, before masking, and the label."""
    ids = torch.where(example["labels"] != -100, example["labels"], example["input_ids"]).tolist()
    special = [i for i, token in enumerate(ids) if token < 5]
    assert [ids[i] for i in special] == [tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id]
    assert special[0] == 0 and special[2] == len(ids) - 1
    assert example["token_type_ids"].tolist() == [0] * (special[1] + 1) + [1] * (len(ids) - special[1] - 1)
    a, b, label = ids[1 : special[1]], ids[special[1] + 1 : -1], int(example["sentence_order_label"])
    assert a and b and example["sentence_order_label"].dim() == 0
    return (b, a, label) if label else (a, b, label)


def test_pairs():
    documents, tokenizer, spans = numbered(SIZES)
    examples = objectives.build("sop", documents, tokenizer, sequence_length=64, seed=3)
    assert examples.heads == ("mlm", "sop")
    labels, lengths = [], []
    for epoch in range(3):
        for i, length in enumerate(examples.lengths(epoch)):
            first, second, label = parts(examples[epoch, i], tokenizer)
            assert document_of(first, spans) == document_of(second, spans)
            assert len(first) + len(second) + 3 == length <= 64
            assert second[0] > first[-1] and (length == 64 or second[0] == first[-1] + 1)
            labels.append(label)
            lengths.append((len(first), len(second)))
    binomial(sum(labels), len(labels), 0.5)
    # neither length nor place tells the label: the first part is as long in both
    firsts = np.array([a for a, _ in lengths])[:, None] * np.array([np.array(labels) == k for k in (0, 1)]).T
    means = firsts.sum(0) / np.array([labels.count(0), labels.count(1)])
    assert abs(means[0] - means[1]) < 5 * 20 / np.sqrt(len(labels) / 2)


@pytest.mark.parametrize(("swapped", "share"), [(0.0, 0), (1.0, 1)])
def test_share_of_swapped_pairs(swapped, share):
    documents, tokenizer, _ = numbered(SIZES)
    examples = objectives.build("sop", documents, tokenizer, sequence_length=64, seed=3, swapped=swapped)
    assert {int(examples[0, i]["sentence_order_label"]) for i in range(len(examples))} == {share}


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=1, max_size=5), st.integers(0, 3))
def test_nothing_is_left_out(sizes, epoch):
    """Where no pair is too long, every word is in one of an epoch, but a token that would be alone."""
    documents, tokenizer, spans = numbered(sizes)
    if max(map(len, spans)) < 2:
        with pytest.raises(ValueError, match="'sop': no document has two tokens; give more text"):
            objectives.build("sop", documents, tokenizer, sequence_length=64, seed=0)
        return
    examples = objectives.build("sop", documents, tokenizer, sequence_length=203, seed=0, short_fraction=0.0)
    seen = []
    for i in range(len(examples.lengths(epoch))):
        first, second, _ = parts(examples[epoch, i], tokenizer)
        seen += first + second
    assert seen == list(itertools.chain(*(span for span in spans if len(span) > 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swapped": 2.0}, r"swapped must be in \[0, 1\], got 2.0"),
        ({"sequence_length": 4}, "'sop': sequence_length must be 5 or more, got 4"),
        ({"documents": [" "]}, "'sop': the documents hold no token; give more text"),
        ({"random_next": 0.5}, "'sop': no option random_next; options: "),
    ],
)
def test_bad_arguments(options, message, wordpiece):
    arguments = {"documents": ["Some text."], "tokenizer": wordpiece, "sequence_length": 16, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        objectives.build("sop", **arguments)
