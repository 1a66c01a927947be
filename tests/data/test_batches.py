"""Step batches: a function of (seed, step) alone; every example once an epoch; the model takes them as they are."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.data import Examples, StepBatches, loader
from llmengine.data.batches import fill


class Made(Examples):
    """Examples of given lengths; the tokens of example i of epoch e are all 1000 e + i."""

    heads = ("clm",)

    def __init__(self, lengths):
        self._lengths = np.array(lengths, np.int64)

    def lengths(self, epoch):
        return self._lengths

    def __getitem__(self, place):
        epoch, index = place
        ids = torch.full((int(self._lengths[index]),), 1000 * epoch + index)
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module")
def examples(novels, wordpiece, bpe) -> dict[str, Examples]:
    return {
        name: objectives.build(name, novels, bpe if name == "clm" else wordpiece, sequence_length=48, seed=5)
        for name in ("bert", "mlm", "clm")
    }


NAMES = pytest.mark.parametrize("name", ["bert", "mlm", "clm"])


def assert_equal(one, other):
    assert (one.items, one.epoch, one.progress) == (other.items, other.epoch, other.progress)
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert (
                a[key] == b[key]
                if key == "max_seqlen"
                else torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype
            )


# ---- filling ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 90), st.integers(1, 5))
def test_fill(lengths, limit, accumulation):
    ends, steps = fill(np.array(lengths), limit, accumulation)
    packs = [sum(lengths[a:b]) for a, b in itertools.pairwise([0, *ends.tolist()])]
    assert sum(packs) == sum(lengths) and min(packs) > 0
    assert max(packs) <= limit
    greedy = 1
    room = limit
    for length in lengths:
        greedy, room = (greedy, room - length) if length <= room else (greedy + 1, limit - length)
    assert steps == -(-greedy // accumulation) <= len(packs) <= steps * accumulation
    # no lower limit would do
    if max(packs) > max(lengths):
        tighter = fill(np.array(lengths), max(packs) - 1, accumulation)[1]
        assert tighter > steps


def test_an_epoch_does_not_end_in_a_small_step():
    batches = StepBatches(Made([10] * 101), batch_tokens=100, seed=0)  # 11 packs, the last of one sequence, if greedy
    sizes = [len(batches[i].micro_batches[0]["input_ids"]) for i in range(batches.steps_per_epoch)]
    assert len(sizes) == 11 and sum(sizes) == 1010 and min(sizes) >= 10 and max(sizes) == 100
    batches = StepBatches(Made([1] * 1009), batch_tokens=100, seed=0)
    sizes = [len(batches[i].micro_batches[0]["input_ids"]) for i in range(batches.steps_per_epoch)]
    assert len(sizes) == 11 and max(sizes) - min(sizes) <= 11


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_example_once_an_epoch(accumulation):
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = StepBatches(Made(lengths), batch_tokens=64, accumulation=accumulation, seed=1)
    orders, step = [], 0
    for epoch in range(3):
        seen = []
        while batches[step].epoch == epoch:
            for micro in batches[step].micro_batches:
                assert len(micro["input_ids"]) <= 64
                bounds = micro["cu_seqlens"].tolist()
                assert (
                    bounds[0] == 0
                    and bounds[-1] == len(micro["input_ids"])
                    and micro["cu_seqlens"].dtype == torch.int32
                )
                assert micro["max_seqlen"] == max(b - a for a, b in itertools.pairwise(bounds))
                for a, b in itertools.pairwise(bounds):
                    (value,) = set(micro["input_ids"][a:b].tolist())
                    assert b - a == lengths[value % 1000] and value // 1000 == epoch
                    seen.append(value % 1000)
            assert 1 <= len(batches[step].micro_batches) <= accumulation
            step += 1
        assert sorted(seen) == list(range(200))
        assert batches[step - 1].progress == epoch + 1
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_without_shuffling_examples_come_in_order():
    batches = StepBatches(Made([3, 5, 2, 7, 1]), batch_tokens=8, seed=1, shuffle=False)
    values = torch.cat([batches[i].micro_batches[0]["input_ids"] for i in range(batches.steps_per_epoch)])
    assert values.unique_consecutive().tolist() == [0, 1, 2, 3, 4]


def test_progress_rises_evenly():
    batches = StepBatches(Made([4] * 40), batch_tokens=16, seed=1)
    progress = [batches[i].progress for i in range(25)]
    assert progress == pytest.approx([(i + 1) / 10 for i in range(25)])


@NAMES
def test_random_access_and_restarts(examples, name):
    def fresh():
        return StepBatches(examples[name], batch_tokens=256, accumulation=2, seed=9)

    batches = fresh()
    per_epoch = batches.steps_per_epoch
    steps = [0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 3 * per_epoch]
    in_order = {i: batches[i] for i in steps}
    for i in reversed(steps):
        assert_equal(batches[i], in_order[i])
        assert_equal(fresh()[i], in_order[i])
    other = StepBatches(examples[name], batch_tokens=256, accumulation=2, seed=10)
    assert not torch.equal(other[0].micro_batches[0]["input_ids"], in_order[0].micro_batches[0]["input_ids"])


@NAMES
def test_workers_change_nothing(examples, name):
    batches = StepBatches(examples[name], batch_tokens=512, accumulation=2, seed=9)
    first, last = batches.steps_per_epoch - 4, batches.steps_per_epoch + 5  # across an epoch's end
    by_hand = [batches[i] for i in range(first, last)]
    for workers in (0, 1, 2):
        for one, other in zip(loader(batches, first, last, workers), by_hand, strict=True):
            assert_equal(one, other)


def test_workers_that_are_not_forked_get_the_same(examples):
    """Where there is no fork a worker unpickles its batches."""
    batches = StepBatches(examples["bert"], batch_tokens=512, seed=9)
    assert_equal(pickle.loads(pickle.dumps(batches))[3], batches[3])


def test_loaders_leave_the_global_generator_alone(examples):
    """Else dropout would depend on how often a run was resumed."""
    before = torch.get_rng_state()
    batches = StepBatches(examples["clm"], batch_tokens=512, seed=9)
    assert len(list(loader(batches, 3, 5, 0))) == len(list(loader(batches, 3, 5, 1))) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_workers_are_quiet(tmp_path):
    """Neither torch nor tokenizers warns about processes forked after threads ran."""
    script = (
        "from llmengine.data import *; from llmengine import objectives;"
        "docs = [d[:60000] for d in read_documents('austen')]; tok = Tokenizer.train(docs, 'bpe', 600);"
        "e = objectives.build('clm', docs, tok, sequence_length=64, seed=0);"
        "print(len(list(loader(StepBatches(e, batch_tokens=512, seed=0), 0, 8, 2))))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    run = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("8\n", "")


# ---- items and the model ---------------------------------------------------------------------------------------------


@NAMES
def test_items_count_what_losses_are_divided_by(examples, name):
    batches = StepBatches(examples[name], batch_tokens=256, accumulation=3, seed=2)
    step = batches[1]
    tokens = sequences = 0
    for micro in step.micro_batches:
        for a, b in itertools.pairwise(micro["cu_seqlens"].tolist()):
            labels = micro["labels"][a:b].tolist()
            tokens += sum(label != -100 for label in (labels[1:] if name == "clm" else labels))
            sequences += 1
    assert step.items == ({"tokens": tokens, "sequences": sequences} if name == "bert" else {"tokens": tokens})
    keys = {"input_ids", "labels", "cu_seqlens", "max_seqlen"}
    assert step.micro_batches[0].keys() == keys | (
        {"token_type_ids", "next_sentence_label"} if name == "bert" else set()
    )


@NAMES
def test_the_model_takes_a_step(examples, name):
    """Losses of the micro-batches sum to the mean over the whole step, taken sequence by sequence."""
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="decoder" if name == "clm" else "encoder", objectives=examples[name].heads, vocab_size=1000,
        d_model=16, n_layers=1, n_heads=2, d_ff=32, max_positions=48, type_vocab_size=2, pooler="cls_tanh",
    )  # fmt: skip
    model = Transformer(config).eval()
    step = StepBatches(examples[name], batch_tokens=200, accumulation=3, seed=2)[1]
    assert len(step.micro_batches) == 3
    totals: dict[str, torch.Tensor] = {}
    for micro in step.micro_batches:
        for head, loss in model(**micro, num_items_in_batch=step.items).losses.items():
            totals[head] = totals.get(head, 0) + loss
    expected = {head: [] for head in examples[name].heads}
    for micro in step.micro_batches:
        for i, (a, b) in enumerate(itertools.pairwise(micro["cu_seqlens"].tolist())):
            output = model(
                micro["input_ids"][None, a:b],
                token_type_ids=micro.get("token_type_ids", micro["labels"] * 0)[None, a:b],
            )
            labels, logits = micro["labels"][a:b], output.logits[0]
            if name == "clm":
                labels, logits = labels[1:], logits[:-1]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            expected[examples[name].heads[0]] += losses[labels != -100].tolist()
            if name == "bert":
                label = micro["next_sentence_label"][i]
                expected["nsp"].append(
                    torch.nn.functional.cross_entropy(output.seq_relationship_logits[0], label).item()
                )
    for head, values in expected.items():
        assert totals[head].item() == pytest.approx(sum(values) / len(values), rel=1e-5)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more, got 0"),
        ({"accumulation": 0}, "accumulation must be 1 or more, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        (
            {"batch_tokens": 9},
            "batch_tokens is 9, but a sequence has 10 tokens; give 10 or more, or a smaller sequence",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatches(Made([10, 3]), **{"batch_tokens": 16, "seed": 0} | arguments)[0]


def test_bad_places():
    batches = StepBatches(Made([10, 3]), batch_tokens=16, seed=0)
    with pytest.raises(IndexError, match="step must be 0 or more, got -1"):
        batches[-1]
    with pytest.raises(ValueError, match="0 <= first <= last, got first 3, last 2"):
        loader(batches, 3, 2)
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        loader(batches, 0, 2, -1)
    with pytest.raises(ValueError, match="no example; give more text"):
        StepBatches(Made([]), batch_tokens=16, seed=0)[0]
    assert list(loader(batches, 2, 2)) == []


# ---- streams ---------------------------------------------------------------------------------------------------------


class Continued(Made):
    """Documents of so many examples each, of 4 tokens, the last of a document shorter."""

    def __init__(self, documents: list[int]) -> None:
        super().__init__([length for count in documents for length in [4] * (count - 1) + [2]])
        self._follows = np.array([place > 0 for count in documents for place in range(count)])

    def follows(self, epoch):
        return self._follows


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(4, 40), st.integers(1, 3), st.booleans())
def test_streams(documents, batch_tokens, accumulation, shuffle):
    """Every example once; a stream reads a document's examples one after another, always in the same micro-batch."""
    examples = Continued(documents)
    batches = StepBatches(examples, batch_tokens=batch_tokens, accumulation=accumulation, seed=3, shuffle=shuffle)
    room, first = batch_tokens // int(examples.lengths(0).max()) * accumulation, 0
    assert batches.steps_per_epoch == -(-sum(documents) // room)
    for epoch in range(2):
        seen, last, home = [], {}, {}
        for number in range(first, first + batches.steps_per_epoch):
            step = batches[number]
            assert step.streams is not None and step.epoch == epoch and len(step.micro_batches) <= accumulation
            for place, (micro, parts) in enumerate(zip(step.micro_batches, step.streams, strict=True)):
                starts = micro["cu_seqlens"][:-1].long()
                assert len(micro["input_ids"]) <= batch_tokens and len(parts) == len(starts) > 0
                for example, (stream, behind) in zip((micro["input_ids"][starts] % 1000).tolist(), parts, strict=True):
                    assert home.setdefault(stream, place) == place
                    before, memory = last.get(stream, (None, -1))
                    goes_on = before == example - 1 and bool(examples.follows(epoch)[example])
                    assert behind == (memory + 1 if goes_on else 0)
                    last[stream] = (example, behind)
                    seen.append(example)
            streams = [part.stream for parts in step.streams for part in parts]
            assert streams == list(range(len(streams)))
        assert sorted(seen) == list(range(sum(documents)))
        first += batches.steps_per_epoch


def test_streams_continue_their_documents():
    """Where there is room for two streams, all of two documents but their first examples are continued."""
    batches = StepBatches(Continued([5, 5]), batch_tokens=8, seed=0)
    parts = [batches[i].streams[0] for i in range(5)]
    assert parts == [[(0, i), (1, i)] for i in range(5)]
    steps = [StepBatches(Continued([1] * 9), batch_tokens=36, seed=seed)[0] for seed in range(5)]
    assert len({str(step.micro_batches[0]["input_ids"].tolist()) for step in steps}) == 5, "documents are shuffled"
