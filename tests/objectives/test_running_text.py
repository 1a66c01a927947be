"""clm and mlm: documents cut into sequences. Every token once an epoch, none across documents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import objectives

from .numbered import document_of, numbered

SIZES = [[1], [2], [7], [30, 41], [100], [8], [9], [300], [1000]]
ODD = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.sampled_from(["word", "\n\n\n", "a\r\nb\r\n", "x" * 3000, "a b " * 2000, "", "\0\x01", "é\u0301 \u202e 👩‍👩‍👧"]),
)


def epoch_of(examples, epoch):
    lengths = examples.lengths(epoch)
    got = [examples[epoch, i] for i in range(len(lengths))]
    assert lengths.dtype == np.int64 and [len(each["input_ids"]) for each in got] == lengths.tolist()
    return got


def originals(example):
    return torch.where(example["labels"] != -100, example["labels"], example["input_ids"]).tolist()


@pytest.mark.parametrize("length", [3, 8, 9, 64])
def test_clm(length):
    documents, tokenizer, spans = numbered(SIZES)
    examples = objectives.build("clm", documents, tokenizer, sequence_length=length, seed=1)
    assert examples.heads == ("clm",)
    text = [[*span, tokenizer.eos_id] for span in spans]
    cuts = []
    for epoch in range(4):
        seen = []
        for example in epoch_of(examples, epoch):
            ids = example["input_ids"].tolist()
            assert torch.equal(example["labels"], example["input_ids"])
            assert 2 <= len(ids) <= length
            document_of([i for i in ids if i != tokenizer.eos_id] or [5], spans)
            assert tokenizer.eos_id not in ids[:-1]
            seen.append(ids)
        assert list(itertools.chain(*seen)) == list(itertools.chain(*text)), "every token once, in order"
        assert len(seen) == len(examples) == sum(-(-len(each) // length) for each in text)
        cuts.append([ids[0] for ids in seen])
    assert cuts[0] != cuts[1], "cuts move between epochs"


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("length", [3, 9, 64])
def test_mlm(length, whole_word):
    documents, tokenizer, spans = numbered(SIZES)
    examples = objectives.build("mlm", documents, tokenizer, sequence_length=length, seed=1, whole_word=whole_word)
    assert examples.heads == ("mlm",)
    masks = []
    for epoch in range(3):
        seen = []
        for example in epoch_of(examples, epoch):
            ids = originals(example)
            assert len(ids) <= length and ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
            assert (example["labels"][[0, -1]] == -100).all()
            assert (example["labels"] != -100).sum() == max(1, round(0.15 * len(ids)))
            document_of(ids[1:-1], spans)
            seen += ids[1:-1]
        assert seen == list(itertools.chain(*spans)), "every token once, in order"
        masks.append([example["input_ids"].tolist() for example in epoch_of(examples, epoch)])
    assert masks[0] != masks[1], "masks are drawn anew each epoch"


@pytest.mark.parametrize("name", ["bert", "mlm", "clm"])
def test_a_function_of_seed_epoch_and_index(name, novels, wordpiece, bpe):
    def make(seed):
        return objectives.build(name, novels, bpe if name == "clm" else wordpiece, sequence_length=64, seed=seed)

    one, other, third = make(7), make(7), make(8)
    places = [(epoch, index) for epoch in (0, 5) for index in (0, 17, 40)]
    expected = {place: one[place] for place in places}
    for place in reversed(places):
        got = other[place]
        assert got.keys() == expected[place].keys()
        assert all(torch.equal(got[key], expected[place][key]) for key in got)
        assert all(value.dtype == torch.int64 for value in got.values())
    assert any(not torch.equal(third[place]["input_ids"], expected[place]["input_ids"]) for place in places)


def test_cut_points_are_spread():
    """A document of 10.5 sequences: the first one's length takes every value allowed, about as often."""
    documents, tokenizer, _ = numbered([[104]])
    examples = objectives.build("clm", documents, tokenizer, sequence_length=10, seed=1)  # 105 tokens with the end
    firsts = np.bincount([examples.lengths(epoch)[0] for epoch in range(3000)], minlength=11)
    assert firsts[:5].sum() == 0
    assert np.abs(firsts[5:] - 500).max() < 5 * np.sqrt(500 * 5 / 6)
    assert {int(examples.lengths(epoch).sum()) for epoch in range(20)} == {105}


@settings(max_examples=60)
@given(st.lists(ODD, min_size=1, max_size=5), st.integers(3, 40))
def test_odd_corpora(bpe, wordpiece, documents, length):
    for name, tokenizer in (("clm", bpe), ("mlm", wordpiece)):
        encoded = [ids for ids in tokenizer.encode_many(documents) if ids]
        if not encoded:
            with pytest.raises(ValueError, match="hold no token"):
                objectives.build(name, documents, tokenizer, sequence_length=length, seed=0)
            continue
        examples = objectives.build(name, documents, tokenizer, sequence_length=length, seed=0)
        expected = [*itertools.chain(*(ids + [tokenizer.eos_id] * (name == "clm") for ids in encoded))]
        got = [originals(each) for each in epoch_of(examples, 1)]
        assert [*itertools.chain(*(ids if name == "clm" else ids[1:-1] for ids in got))] == expected
    text = "".join(bpe.decode(ids) for ids in bpe.encode_many(documents))
    assert text == "".join(documents), "what the clm sees is the text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nsp"}, "'nsp' is not one of bert, mlm, sop, clm, "),
        ({"name": "clm", "whole_word": True}, "'clm': no option whole_word; options: none"),
        ({"name": "mlm", "whole_words": True}, "'mlm': no option whole_words; options: mask_fraction, mode, "),
        ({"name": "clm"}, "'clm': the tokenizer has no eos token; train one of kind \"bpe\""),
        ({"name": "clm", "tokenizer": "bpe", "sequence_length": 2}, "'clm': sequence_length must be 3 or more, got 2"),
        ({"name": "mlm", "tokenizer": "bpe"}, "'mlm': the tokenizer has no cls, sep, mask token; .* \"wordpiece\""),
        ({"name": "mlm", "sequence_length": 2}, "'mlm': sequence_length must be 3 or more, got 2"),
        ({"name": "bert", "sequence_length": 4}, "'bert': sequence_length must be 5 or more, got 4"),
        ({"name": "bert", "random_next": 2}, r"random_next must be in \[0, 1\], got 2"),
        ({"name": "mlm", "documents": []}, "'mlm': the documents hold no token; give more text"),
        ({"name": "bert", "documents": [" "]}, "'bert': the documents hold no token; give more text"),
        ({"name": "bert", "documents": ["One. Two."]}, "'bert': one document of 4 tokens is too short for random"),
        ({"name": "mlm", "seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
    ],
)  # fmt: skip
def test_bad_arguments(wordpiece, bpe, arguments, message):
    arguments = {"documents": ["Some text. More."], "tokenizer": "", "sequence_length": 16, "seed": 0} | arguments
    arguments["tokenizer"] = bpe if arguments["tokenizer"] == "bpe" else wordpiece
    with pytest.raises(ValueError, match=message):
        objectives.build(**arguments)


@pytest.mark.parametrize("name", ["mlm", "clm"])
@pytest.mark.parametrize("index", [-1, 10**6])
def test_bad_places(name, index, wordpiece, bpe):
    tokenizer = bpe if name == "clm" else wordpiece
    examples = objectives.build(name, ["Some text."], tokenizer, sequence_length=16, seed=0)
    with pytest.raises(IndexError, match=f"example {index} is not in \\[0, 1\\)"):
        examples[0, index]
