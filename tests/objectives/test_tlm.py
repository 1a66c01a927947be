"""Translation language modelling: pairs as XLM joins them, masks in both sentences, a run from parallel files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.data import Pairs, StepBatches, Tokenizer, read_pairs
from llmengine.objectives.tlm import _fitted
from llmengine.training import RunConfig, train
from tests.cli.conftest import succeed

from .distributions import binomial, chi_square
from .numbered import FIRST, numbered


def pairs_of(sizes: list[tuple[int, int]]) -> tuple[Pairs, Tokenizer, list[tuple[range, range]]]:
    """Pairs of these numbers of words, no word twice; their tokenizer; and both sides' ids."""
    documents, tokenizer, spans = numbered([[n] for pair in sizes for n in pair])
    rows = tuple(zip(documents[::2], documents[1::2], strict=True))
    return Pairs(rows), tokenizer, list(zip(spans[::2], spans[1::2], strict=True))


def build(pairs, tokenizer, **options):
    return objectives.build("tlm", pairs, tokenizer, **{"sequence_length": 32, "seed": 3} | options)


def truth(example) -> list[int]:
    """The ids before they were masked."""
    return torch.where(example["labels"] == -100, example["input_ids"], example["labels"]).tolist()


@pytest.mark.parametrize("restart", [True, False])
def test_pairs_are_joined_as_by_xlm(restart):
    pairs, tokenizer, spans = pairs_of([(3, 5), (7, 2)])
    examples = build(pairs, tokenizer, restart_positions=restart)
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    for i, (source, target) in enumerate(spans):
        example = examples[0, i]
        between = [sep, cls] if restart else [sep]
        assert truth(example) == [cls, *source, *between, *target, sep]
        first = len(source) + 2
        rest = len(target) + (2 if restart else 1)
        assert example["token_type_ids"].tolist() == [0] * first + [1] * rest
        if restart:
            assert example["position_ids"].tolist() == [*range(first), *range(rest)]
        else:
            assert "position_ids" not in example
        assert examples.lengths(0)[i] == len(example["input_ids"]) == first + rest
    assert "token_type_ids" not in build(pairs, tokenizer, languages=False)[0, 0]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), st.integers(6, 40))
def test_long_pairs_lose_the_longer_sentences_end(sizes, length):
    pairs, tokenizer, spans = pairs_of(sizes)
    examples = build(pairs, tokenizer, sequence_length=length)
    for i, (source, target) in enumerate(spans):
        ids = [x for x in truth(examples[0, i]) if x >= FIRST]
        a, b = ([x for x in ids if x in side] for side in (source, target))
        assert ids == a + b and a == list(source)[: len(a)] and b == list(target)[: len(b)] and a and b
        assert len(ids) == min(len(source) + len(target), length - 4)
        cut = len(source) - len(a), len(target) - len(b)
        if cut[0] and cut[1]:
            assert abs(len(a) - len(b)) <= 1
        elif cut[0] or cut[1]:
            longer, shorter = (a, b) if cut[0] else (b, a)
            assert len(longer) >= len(shorter) - 1


def test_fitted():
    sizes = np.array([[5, 5], [9, 2], [2, 9], [9, 9], [6, 9], [1, 1]])
    assert _fitted(sizes, 9).tolist() == [[5, 4], [7, 2], [2, 7], [5, 4], [5, 4], [1, 1]]


def test_masks_fall_on_both_sentences_and_never_on_special_tokens():
    pairs, tokenizer, _ = pairs_of([(24, 16)])
    examples = build(pairs, tokenizer, sequence_length=44)
    places, fates, drawn = np.zeros(44), np.zeros(3), []
    for epoch in range(3000):
        example = examples[epoch, 0]
        labels, ids = example["labels"].numpy(), example["input_ids"].numpy()
        chosen = np.flatnonzero(labels != -100)
        assert len(chosen) == round(0.15 * 44)
        places[chosen] += 1
        kinds = np.where(ids[chosen] == tokenizer.mask_id, 0, np.where(ids[chosen] == labels[chosen], 2, 1))
        fates += np.bincount(kinds, minlength=3)
        drawn += ids[chosen][kinds == 1].tolist()
    special = [0, 25, 26, 43]
    assert not places[special].any()
    chi_square(np.delete(places, special), [1 / 40] * 40)
    binomial(places[:25].sum(), places.sum(), 24 / 40)
    v = tokenizer.vocab_size
    # a random token may be the mask, or the token itself
    chi_square(fates, [0.8 + 0.1 / v, 0.1 * (1 - 2 / v), 0.1 + 0.1 / v])
    assert len(set(drawn)) > 0.9 * (v - 1)


def test_whole_words(wordpiece, novels):
    words = novels[0].split()[:400]
    pairs = Pairs(tuple((" ".join(words[i : i + 8]), " ".join(words[i + 8 : i + 15])) for i in range(0, 300, 15)))
    examples = build(pairs, wordpiece, sequence_length=64, whole_word=True, mask_share=1.0, random_share=0.0)
    for i in range(len(examples)):
        example = examples[0, i]
        tokens = [wordpiece.token(x) for x in truth(example)]
        hidden = (example["labels"] != -100).tolist()
        for j, token in enumerate(tokens):
            assert not token.startswith("##") or hidden[j] == hidden[j - 1], "a word is hidden whole"


def test_the_model_reads_positions_that_begin_anew():
    """The translation's states are those of the same tokens at these positions, packed beside other pairs or not."""
    pairs, tokenizer, _ = pairs_of([(6, 4), (3, 9), (5, 5)])
    step = StepBatches(build(pairs, tokenizer), batch_tokens=256, seed=1, shuffle=False)[0]
    (micro,) = step.micro_batches
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig.preset(
            "bert-tiny", vocab_size=tokenizer.vocab_size, objectives=["mlm"], pooler="none", d_model=32, d_ff=48,
            dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, init_std=0.3, max_positions=16,
        )
    )  # fmt: skip
    together = model(**micro, num_items_in_batch=step.items).loss
    alone = 0.0
    examples = build(pairs, tokenizer)
    for i in range(3):
        batch = {name: x[None] for name, x in examples[0, i].items()}
        alone += model(**batch, num_items_in_batch=step.items).loss
    torch.testing.assert_close(together, alone)
    running = {name: x for name, x in micro.items() if name != "position_ids"}
    assert abs((model(**running, num_items_in_batch=step.items).loss - together).item()) > 1e-3


# ---- corpora and runs ------------------------------------------------------------------------------------------------

# a language whose words are another's turned round: to fill a mask, look at the other side
WORDS = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]


def corpus(directory, kind: str) -> list[str]:
    draws = np.random.default_rng(0)
    rows = []
    for _ in range(600):
        words = draws.choice(WORDS, draws.integers(3, 7)).tolist()
        rows.append({"source": " ".join(words), "target": " ".join(word[::-1] for word in words)})
    if kind == "jsonl":
        (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return [str(directory / "pairs.jsonl")]
    for side in ("source", "target"):
        (directory / f"{side}.txt").write_text("".join(row[side] + "\n" for row in rows))
    return [str(directory / f"{side}.txt") for side in ("source", "target")]


def run_config(directory, kind: str = "jsonl", **fields) -> RunConfig:
    return RunConfig.from_dict(
        {
            "corpus": corpus(directory, kind), "objective": "tlm", "steps": 60,
            "model": {"preset": "bert-tiny", "d_model": 32, "d_ff": 64, "max_positions": 48, "init_std": 0.1},
            "tokenizer": {"vocab_size": 400}, "optimizer": {"lr": 0.01}, "every": {"evaluate": 30, "save": 30},
            "data": {"sequence_length": 40, "batch_tokens": 1024, "held_out": 0.1},
            "schedule": {"kind": "constant", "warmup": 0},
        } | fields
    )  # fmt: skip


def test_both_kinds_of_corpus_are_the_same(tmp_path):
    assert read_pairs(corpus(tmp_path, "jsonl")) == read_pairs(corpus(tmp_path, "parallel"))


def test_a_run(tmp_path):
    result = train(run_config(tmp_path), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert result.evaluation["losses"].keys() == {"mlm"} == result.evaluation["accuracy"].keys()
    again = json.loads(succeed("evaluate", tmp_path / "run", "--json"))
    assert again["losses"] == pytest.approx(result.evaluation["losses"], rel=1e-5)
    shown = succeed("inspect", tmp_path / "run", "--sequences", "1")
    assert "540 pairs to train on" in shown and "the translation, whose positions begin anew, from token" in shown
    assert "[CLS]" in shown and "masked" in shown


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, half = (run_config(tmp_path, steps=n, every={"evaluate": 5, "save": 5}) for n in (10, 5))
    train(whole, tmp_path / "whole")
    train(half, tmp_path / "halves")
    train(whole, tmp_path / "halves", resume=True)
    models = [Transformer.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "halves")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_split():
    pairs = Pairs(tuple((f"a {i}", f"b {i}") for i in range(50)))
    train_part, held_out = pairs.split(0.2, seed=4)
    assert (len(train_part), len(held_out)) == (40, 10) and {*train_part, *held_out} == {*pairs}
    assert pairs.split(0.2, seed=4)[1] == held_out != pairs.split(0.2, seed=5)[1]
    assert pairs.split(0, seed=4) == (pairs, Pairs(()))
    with pytest.raises(ValueError, match=r"1 pairs are too few to hold out 0.2 of them"):
        Pairs((("a", "b"),)).split(0.2, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 5}, "'tlm': sequence_length must be 6 or more, got 5"),
        ({"sequence_length": 4, "restart_positions": False}, "'tlm': sequence_length must be 5 or more, got 4"),
        ({"pairs": [("a", "")]}, "'tlm': no pair has tokens on both sides"),
        ({"pairs": ["a text"]}, r"'tlm': expected pairs \(source, target\) of strings, got 'a text'"),
        ({"pairs": [("a", 3)]}, "'tlm': expected pairs"),
        ({"mask_fraction": 2.0}, r"mask_fraction must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_arguments(options, message, wordpiece):
    options = {"pairs": [("a", "b")]} | options
    with pytest.raises(ValueError, match=message):
        build(options.pop("pairs"), wordpiece, **options)


def test_bad_corpora(tmp_path, wordpiece):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 has no column 'target'; its columns: 'source'"):
        read_pairs(path)
    path.write_text('{"source": "a", "target": 3}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: target is 3; expected a text"):
        read_pairs(path)
    one, other = tmp_path / "a.de", tmp_path / "a.en"
    one.write_text("ein\nzwei\n")
    other.write_text("one\n")
    with pytest.raises(ValueError, match=r"has 2 lines and .* has 1"):
        read_pairs([one, other])
    with pytest.raises(ValueError, match='"parallel" takes two files, source and target; got 1'):
        read_pairs(one)
    with pytest.raises(ValueError, match="pairs of texts are for objective 'tlm'; give documents"):
        objectives.build("mlm", Pairs((("a", "b"),)), wordpiece, sequence_length=16, seed=0)
    with pytest.raises(ValueError, match=r'type_vocab_size is 1; objective "tlm" .* or data.options.languages: false'):
        run_config(tmp_path, model={"preset": "roberta-base"})
