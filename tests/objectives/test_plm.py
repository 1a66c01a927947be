"""XLNet's objective: spans, orders, and above all that predictions depend on what precedes them and on nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.data.draws import Draws, Purpose
from llmengine.data.examples import pack
from llmengine.objectives.plm import PlmOptions, choose, ranks
from llmengine.training.config import OptimizerSection
from llmengine.training.optimizer import adamw

from .distributions import binomial, chi_square
from .numbered import document_of, numbered

SIZES = [[1], [2], [7], [30, 41], [100], [9], [300]]


def draws(i: int) -> Draws:
    return Draws(1, i, Purpose.MASK)


def last(tokens: int, specials: int) -> np.ndarray:
    """Which tokens are special: the last ones."""
    return np.arange(tokens) >= tokens - specials


def runs(chosen: np.ndarray) -> list[int]:
    """The lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


# ---- spans -----------------------------------------------------------------------------------------------------------


def test_span_lengths():
    """n words with probability proportional to 1 / n; in a long text with few targets only the last span is cut."""
    found = []
    for i in range(3000):
        # two spans are never closer than one token of context here: the sum of lengths is cut at 12
        found += runs(choose(np.ones(4000, bool), 12, PlmOptions(k=50), draws(i)))[:1]
    counts = np.bincount(found, minlength=8)[1:6]
    assert counts.sum() > 0.97 * len(found), "spans touch only where no context was drawn between them"
    chi_square(counts, 1 / np.arange(1, 6) / (1 / np.arange(1, 6)).sum())


def test_counts_are_exact():
    words = np.random.default_rng(0).random(300) < 0.6
    for i in range(200):
        for begins in (np.ones(300, bool), words):
            assert choose(begins, 50, PlmOptions(), draws(i)).sum() == 50
    for length in (1, 2, 5):
        assert choose(np.ones(length, bool), 9, PlmOptions(), draws(0)).sum() == length


def test_whole_words():
    """Words of three tokens: but for the few that fill up the number, all of a word or nothing of it."""
    words = np.tile([True, False, False], 100)
    parts = whole = 0
    for i in range(300):
        of_word = choose(words, 48, PlmOptions(), draws(i)).reshape(100, 3).sum(1)
        whole += (of_word == 3).sum()
        parts += ((of_word == 1) | (of_word == 2)).sum()
    assert whole > 9 * parts and whole > 300 * 8


def test_context_lies_on_both_sides():
    """A first span begins 0 to n k - 1 tokens from the text's beginning, evenly."""
    firsts = [
        int(np.flatnonzero(choose(np.ones(900, bool), 2, PlmOptions(longest_gram=1), draws(i)))[0]) for i in range(6000)
    ]
    chi_square(np.bincount(firsts, minlength=6), [1 / 6] * 6)


# ---- orders ----------------------------------------------------------------------------------------------------------


def test_orders_are_uniform():
    predicted = np.array([True, False, True, True, False, False])
    orders = []
    for i in range(6000):
        query, key = ranks(predicted, last(6, 1), None, draws(i))
        assert (key[[1, 4]] == -1).all() and (query[[1, 4]] == 0).all()
        assert query[5] == key[5] + 1 and (query[predicted] == key[predicted]).all()
        orders.append(tuple(np.argsort(key[predicted]).tolist()))
    expected = list(itertools.permutations(range(3)))
    chi_square([orders.count(each) for each in expected], [1 / 6] * 6)


def test_blocks_follow_each_other():
    for i in range(50):
        _, key = ranks(np.ones(23, bool), last(23, 0), 8, draws(i))
        assert sorted(key.tolist()) == list(range(23))
        assert [sorted(part.tolist()) for part in np.split(key, [8, 16])] == [
            list(range(8)), list(range(8, 16)), list(range(16, 23)),
        ]  # fmt: skip


def test_the_papers_mask():
    """The dense perm_mask that the paper's data pipeline makes of an order, entry by entry."""
    predicted = np.random.default_rng(3).random(20) < 0.4
    predicted[-2:] = False
    query, key = ranks(predicted, last(20, 2), None, draws(0))
    functional = np.arange(20) >= 18
    hidden_from = np.where(predicted, key, key + 1)
    for i, j in itertools.product(range(20), range(20)):
        masked = hidden_from[i] <= key[j] and (predicted[j] or functional[j])
        assert masked == (key[j] >= query[i])


@pytest.mark.parametrize("special", [[19], [12, 18, 19]])
def test_the_papers_mask_of_two_parts(special):
    """Both halves' masks, of which the first sees nothing of the second, and the second all of the first."""
    predicted = np.random.default_rng(4).random(20) < 0.4
    functional = np.isin(np.arange(20), special)
    predicted[functional] = False
    query, key = ranks(predicted, functional, None, draws(1), reuse=8)
    for i, j in itertools.product(range(20), range(20)):
        if (i < 8) != (j < 8):
            masked = i < 8
        else:
            # an order of the half's tokens, as the ranks say; others than targets see themselves
            masked = (key[i] if predicted[i] else key[i] + 1) <= key[j] and bool(predicted[j] or functional[j])
        assert masked == (key[j] >= query[i]), (i, j)
    assert len(set(key[8:][predicted[8:] | functional[8:]])) == (predicted | functional)[8:].sum()


# ---- examples --------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(4, 60), st.integers(1, 10), st.sampled_from([None, 1, 7]), st.booleans(), st.integers(0, 2))
def test_examples(length, k, perm_size, whole_word, epoch):
    documents, tokenizer, spans = numbered(SIZES)
    examples = objectives.build(
        "plm", documents, tokenizer, sequence_length=length, seed=2, k=k, perm_size=perm_size, whole_word=whole_word
    )
    seen, lengths = [], examples.lengths(epoch)
    for i in range(len(examples)):
        example = examples[epoch, i]
        ids, at = example["input_ids"].tolist(), example["target_positions"]
        assert len(ids) == lengths[i] <= length and ids[-2:] == [tokenizer.sep_id, tokenizer.cls_id]
        assert len(at) == min(max(1, len(ids) // k), len(ids) - 2)
        assert torch.equal(example["labels"], example["input_ids"][at]), "the content stream holds the truth"
        assert example["token_type_ids"].tolist() == [0] * (len(ids) - 1) + [2]
        document_of(ids[:-2], spans)
        seen += ids[:-2]
    assert seen == list(itertools.chain(*spans)), "every token once, in order"


def test_shares(novels, xlnet_bpe):
    """Every place of a text is predicted about as often, first and last ones included."""
    examples = objectives.build("plm", novels[:1], xlnet_bpe, sequence_length=62, seed=2, whole_word=False)
    index = next(i for i, n in enumerate(examples.lengths(0)) if n == 62 and i)
    counts = np.zeros(62)
    for epoch in range(1500):
        counts[examples[epoch, index]["target_positions"]] += 1
    assert counts[:60].min() > 0 and counts[60:].sum() == 0 and counts.sum() == 1500 * 10
    binomial(counts[10:40].sum(), 1500 * 30, counts[10:40].sum() / 45000)
    assert counts[5:50].max() < 2 * counts[5:50].min()


def model_of(vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="encoder", objectives=("plm",), vocab_size=vocab_size, d_model=32, n_layers=3, n_heads=2, d_ff=64,
        max_positions=None, positions="relative", norm_place="post", final_norm=False, init_std=0.2,
    )  # fmt: skip
    return Transformer(config).eval()


@pytest.mark.parametrize(
    "options", [{}, {"perm_size": 8}, {"reuse": 16}, {"two_segments": True}, {"two_segments": True, "reuse": 12}]
)
def test_a_prediction_depends_on_what_precedes_it_and_on_nothing_else(options):
    """Change one token of a packed batch: the predictions that move are those that may see it, and all of those."""
    documents, tokenizer, _ = numbered([[40], [23]])
    examples = objectives.build("plm", documents, tokenizer, sequence_length=43, seed=2, k=4, **options)
    batch = pack([examples[0, i] for i in range(2)])
    labels = batch.pop("labels")
    model = model_of(tokenizer.vocab_size)
    bounds, at = batch["cu_seqlens"].tolist(), batch["target_positions"]
    sequence = torch.bucketize(torch.arange(bounds[-1]), batch["cu_seqlens"][1:], right=True)
    with torch.no_grad():
        before = model(**batch).logits
        assert before.shape == (len(labels), tokenizer.vocab_size)
        for place in range(bounds[-1]):
            ids = batch["input_ids"].clone()
            ids[place] = 7 if ids[place] != 7 else 8
            moved = (model(**{**batch, "input_ids": ids}).logits - before).abs().amax(1)
            may = (sequence[at] == sequence[place]) & (batch["key_ranks"][place] < batch["query_ranks"][at])
            assert (moved[~may] == 0).all(), "what comes later in the order, or itself, is not seen"
            assert (moved[may] > 1e-6).all(), "what precedes is"
    if reuse := options.get("reuse"):
        early = (at - batch["cu_seqlens"][:-1].long()[sequence[at]]) < reuse
        late = (torch.arange(bounds[-1]) - batch["cu_seqlens"][:-1].long()[sequence]) >= reuse
        seen = batch["key_ranks"][None] < batch["query_ranks"][at][:, None]
        assert not seen[early][:, late].any() and early.any(), "the first part sees nothing of the second"


@settings(max_examples=25)
@given(st.integers(9, 60), st.integers(0, 8), st.integers(1, 6), st.booleans(), st.integers(0, 2))
def test_two_segments(length, reuse, k, whole_word, epoch):
    documents, tokenizer, spans = numbered(SIZES)
    reuse = min(reuse, length - 5)
    examples = objectives.build(
        "plm", documents, tokenizer, sequence_length=length, seed=2, k=k, two_segments=True, reuse=reuse,
        whole_word=whole_word,
    )  # fmt: skip
    lengths, follows = examples.lengths(epoch), 0
    for i in range(len(examples)):
        example = examples[epoch, i]
        ids, types, at = (example[name].tolist() for name in ("input_ids", "token_type_ids", "target_positions"))
        assert len(ids) == lengths[i] <= length and ids[-2:] == [tokenizer.sep_id, tokenizer.cls_id]
        assert torch.equal(example["labels"], example["input_ids"][at])
        assert not set(example["labels"].tolist()) & {tokenizer.sep_id, tokenizer.cls_id}
        if len(ids) == 3:  # a text of one token
            assert types == [0, 0, 2]
            continue
        middle = ids.index(tokenizer.sep_id)
        assert types == [0] * (middle + 1) + [1] * (len(ids) - middle - 2) + [2]
        a, b = ids[:middle], ids[middle + 1 : -2]
        document_of(a, spans)
        assert b == list(range(b[0], b[0] + len(b)))
        follows += b[0] == a[-1] + 1
        has_part = len(a) + len(b) >= reuse + 2
        assert len(a) > reuse or not has_part
        assert len(at) <= max(1, len(ids) // k)


def test_half_of_the_second_segments_are_random(novels, xlnet_bpe):
    def shares(**options):
        examples = objectives.build(
            "plm", novels, xlnet_bpe, sequence_length=32, seed=2, two_segments=True, **options
        )  # fmt: skip
        plain = objectives.build("plm", novels, xlnet_bpe, sequence_length=31, seed=2)
        same = total = 0
        for i in range(len(examples)):
            ids, text = examples[0, i]["input_ids"].tolist(), plain[0, i]["input_ids"].tolist()[:-2]
            ids = [x for x in ids if x not in (xlnet_bpe.sep_id, xlnet_bpe.cls_id)]
            same, total = same + (ids == text), total + 1
        return same, total

    same, total = shares()
    binomial(same, total, 0.5)
    assert shares(random_next=0.0) == (total, total) and shares(random_next=1.0)[0] < 0.05 * total


def test_where_the_second_segment_begins():
    """At the beginning of any word but the first, each as likely."""
    documents, tokenizer, _ = numbered([[9]])
    examples = objectives.build(
        "plm", documents, tokenizer, sequence_length=12, seed=2, two_segments=True, reuse=3, random_next=0.0
    )
    places = [examples[epoch, 0]["input_ids"].tolist().index(tokenizer.sep_id) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert counts[:4].sum() == 0
    chi_square(counts[4:9], [1 / 5] * 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be 1 or more, got 0"),
        ({"perm_size": 0}, "perm_size must be 1 or more, got 0"),
        ({"reuse": -1}, "reuse must be 0 or more, got -1"),
        ({"reuse": 13}, r"'plm': sequence_length must be 17 or more \(reuse is 13\), got 16"),
        ({"random_next": 1.5}, r"random_next must be in \[0, 1\], got 1.5"),
        ({"sequence_length": 3}, "'plm': sequence_length must be 4 or more, got 3"),
        ({"documents": [""]}, "'plm': the documents hold no token; give more text"),
    ],
)
def test_bad_arguments(options, message, xlnet_bpe):
    arguments = {"documents": ["Some text."], "tokenizer": xlnet_bpe, "sequence_length": 16, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        objectives.build("plm", **arguments)


def test_a_tokenizer_without_its_special_tokens(bpe):
    with pytest.raises(ValueError, match='no sep, cls token; train one of kind "bpe" and family "xlnet"'):
        objectives.build("plm", ["Some text."], bpe, sequence_length=16, seed=0)


def test_biases_of_the_scores_do_not_decay():
    model = model_of(50)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        {names[id(p)] for p in group["params"]} for group in adamw(model, OptimizerSection()).param_groups
    )
    assert "encoder.layers.0.attention.q.weight" in decayed
    assert {name for name in names.values() if name.endswith("bias")} <= others
    assert "encoder.layers.0.attention.position_bias" in others
