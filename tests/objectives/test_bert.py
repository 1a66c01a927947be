"""Sentence pairs as BERT's: labels tell the truth, no pair mixes documents, nothing is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import objectives

from .numbered import document_of, numbered

SIZES = np.random.default_rng(0).integers(1, 20, (6, 400)).tolist()


@pytest.fixture(scope="module")
def corpus():
    return numbered(SIZES)


def parts(example, tokenizer):
    """Segments A and B before masking, with everything checked that holds for each example."""
    ids = torch.where(example["labels"] != -100, example["labels"], example["input_ids"]).tolist()
    special = [i for i, token in enumerate(ids) if token < 5]
    assert special[0] == 0 and special[2] == len(ids) - 1 and len(special) == 3
    assert [ids[i] for i in special] == [tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id]
    assert (example["labels"][special] == -100).all()
    assert (example["labels"] != -100).sum() == min(max(1, round(0.15 * len(ids))), len(ids) - 3)
    assert example["token_type_ids"].tolist() == [0] * (special[1] + 1) + [1] * (len(ids) - special[1] - 1)
    assert example["next_sentence_label"].dim() == 0
    return ids[1 : special[1]], ids[special[1] + 1 : -1], int(example["next_sentence_label"])


def test_pairs(corpus):
    documents, tokenizer, spans = corpus
    examples = objectives.build("bert", documents, tokenizer, sequence_length=64, seed=3)
    assert examples.heads == ("mlm", "nsp")
    labels, gaps = [], 0
    for epoch in range(2):
        lengths = examples.lengths(epoch)
        for i, length in enumerate(lengths):
            a, b, label = parts(examples[epoch, i], tokenizer)
            assert len(a) + len(b) + 3 == length <= 64 and a and b
            if label == 0:
                assert document_of(a, spans) == document_of(b, spans)
                assert b[0] > a[-1]
                if length < 64:
                    assert b[0] == a[-1] + 1, "nothing is cut out of a pair that fits"
                gaps += b[0] - a[-1] - 1
            else:
                assert document_of(a, spans) != document_of(b, spans)
            labels.append(label)
    n = len(labels)
    # a segment alone can have no true continuation: a little more than half are random
    assert abs(sum(labels) - n / 2) < 5 * np.sqrt(n / 4) + 0.01 * n
    assert 0 < gaps / n < 8


def test_nothing_is_left_out():
    """One-word sentences need no truncation: A and true B together are every word once, random B are the rest."""
    documents, tokenizer, spans = numbered([[1] * 700, [1] * 3, [1], [1] * 250])
    examples = objectives.build("bert", documents, tokenizer, sequence_length=32, seed=0)
    shapes = []
    for epoch in range(3):
        seen = []
        for i in range(len(examples.lengths(epoch))):
            a, b, label = parts(examples[epoch, i], tokenizer)
            seen += a if label else a + b
        assert seen == list(itertools.chain(*spans))
        shapes.append(examples.lengths(epoch).tolist())
    assert shapes[0] != shapes[1], "pairs are drawn anew each epoch"


@pytest.mark.parametrize(("random_next", "share"), [(0.0, 0), (1.0, 1)])
def test_share_of_random_pairs(corpus, random_next, share):
    documents, tokenizer, _ = corpus
    # a short pair of one sentence must take a random one
    options = {"random_next": random_next, "short_fraction": 0.0}
    examples = objectives.build("bert", documents, tokenizer, sequence_length=64, seed=3, **options)
    labels = [int(examples[0, i]["next_sentence_label"]) for i in range(len(examples))]
    # and so must a document's last one, where it is alone
    assert abs(np.mean(labels) - share) <= len(documents) / len(labels)


def test_short_pairs(corpus):
    documents, tokenizer, _ = corpus

    def short(fraction):
        examples = objectives.build(
            "bert", documents, tokenizer, sequence_length=256, seed=3, short_fraction=fraction, random_next=0.0
        )
        return np.concatenate([examples.lengths(epoch) for epoch in range(10)]) < 256

    assert short(0.0).sum() <= 10 * len(documents), "only a document's last pair"
    assert short(1.0).mean() > 0.9
    always, n = short(0.0).mean(), len(short(0.1))
    assert abs(short(0.1).mean() - always - 0.1 * (1 - always)) < 5 * np.sqrt(0.09 / n)


def test_random_segments_come_from_all_other_documents_alike():
    documents, tokenizer, spans = numbered([[1] * 3000, [1] * 40, [1] * 40, [1] * 400])
    examples = objectives.build("bert", documents, tokenizer, sequence_length=8, seed=0, random_next=1.0)
    origins = []
    for i in range(len(examples)):
        a, b, _ = parts(examples[0, i], tokenizer)
        if document_of(a, spans) == 0:
            origins.append(document_of(b, spans))
    counts = np.bincount(origins, minlength=4)
    n = len(origins)
    assert counts[0] == 0 and n > 500
    assert np.abs(counts[1:] - n / 3).max() < 5 * np.sqrt(n * 2 / 9)


def test_a_corpus_of_one_document():
    """Random segments lie outside the pair's own text."""
    documents, tokenizer, _ = numbered([[3] * 200])
    examples = objectives.build("bert", documents, tokenizer, sequence_length=40, seed=0)
    labels = []
    for i in range(len(examples)):
        a, b, label = parts(examples[0, i], tokenizer)
        assert not set(a) & set(b)
        if label and len(a) + len(b) < 37:
            assert b[0] != a[-1] + 1
        labels.append(label)
    assert 0.2 < np.mean(labels) < 0.9


def test_truncation_takes_from_the_longer_at_both_ends():
    documents, tokenizer, _ = numbered([[40] * 60, [40] * 60])
    examples = objectives.build("bert", documents, tokenizer, sequence_length=103, seed=0)
    fronts = ends = 0
    for i in range(len(examples)):
        a, b, _ = parts(examples[0, i], tokenizer)
        assert len(a) + len(b) <= 100
        for part in (a, b):
            fronts += (part[0] - 5) % 40 != 0
            ends += (part[-1] - 5) % 40 != 39
    assert fronts > 20 and ends > 20
    assert 0.6 < fronts / ends < 1.7


def test_long_sentences_are_cut_not_lost():
    documents, tokenizer, spans = numbered([[1000], [37] * 5])
    examples = objectives.build("bert", documents, tokenizer, sequence_length=40, seed=0, random_next=0.0)
    seen = set()
    for epoch in range(40):
        for i in range(len(examples.lengths(epoch))):
            a, b, label = parts(examples[epoch, i], tokenizer)
            seen.update(a if label else a + b)
    assert seen >= set(spans[0])


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=2, max_size=5),
    st.integers(5, 30),
    st.integers(0, 3),
)
def test_any_corpus(sizes, length, epoch):
    documents, tokenizer, spans = numbered(sizes)
    examples = objectives.build("bert", documents, tokenizer, sequence_length=length, seed=0)
    for i in range(len(examples.lengths(epoch))):
        a, b, label = parts(examples[epoch, i], tokenizer)
        assert (document_of(a, spans) == document_of(b, spans)) == (label == 0)
        assert label or b[0] > a[-1]


def test_whole_words(novels, wordpiece):
    examples = objectives.build("bert", novels, wordpiece, sequence_length=64, seed=0, whole_word=True)
    whole = cut = 0
    for i in range(100):
        example = examples[0, i]
        chosen = (example["labels"] != -100).tolist()
        ids = torch.where(example["labels"] != -100, example["labels"], example["input_ids"]).tolist()
        for at in range(1, len(ids)):
            if wordpiece.token(ids[at]).startswith("##") and ids[at - 1] >= 5:
                whole += chosen[at] and chosen[at - 1]
                cut += chosen[at] != chosen[at - 1]
    assert whole > 100 and cut == 0
