"""XLNet's objective with memory: steps read what steps before them left, and that is what the whole text would say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmengine import Transformer, TransformerConfig, objectives
from llmengine.convert import FAMILIES
from llmengine.data import StepBatches
from llmengine.testing import assert_near
from llmengine.training.memory import StreamMemory
from tests.models.peers import gradients_as_theirs, gradients_of

from .numbered import document_of, numbered

LENGTH, REUSE = 21, 8  # 18 tokens of text and three special ones


def model_of(vocab_size: int, *, memory: int, layers: int = 3, **fields) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="encoder", objectives=("plm",), vocab_size=vocab_size, d_model=32, n_layers=layers, n_heads=2,
        d_ff=64, max_positions=None, positions="relative", norm_place="post", final_norm=False, init_std=0.2,
        memory_length=memory, memory_reuse=REUSE, **fields,
    )  # fmt: skip
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batches_of(sizes: list[int], *, memory: int, rows: int, accumulation: int = 1) -> tuple[StepBatches, int]:
    """Documents of so many tokens in streams; and the size of the vocabulary."""
    documents, tokenizer, _ = numbered([[size] for size in sizes])
    examples = objectives.build(
        "plm", documents, tokenizer, sequence_length=LENGTH, seed=2, k=3, two_segments=True, reuse=REUSE, memory=memory
    )
    batches = StepBatches(examples, batch_tokens=LENGTH * rows, accumulation=accumulation, seed=2, shuffle=False)
    return batches, tokenizer.vocab_size


def example_of(batches: StepBatches, step: int, row: int) -> dict[str, Tensor]:
    """A sequence of a step's only micro-batch, as it is alone."""
    micro = batches[step].micro_batches[0]
    begin, end = micro["cu_seqlens"][row : row + 2].tolist()
    at = micro["target_positions"]
    here = (at >= begin) & (at < end)
    names = ("input_ids", "token_type_ids", "query_ranks", "key_ranks")
    alone = {name: micro[name][begin:end] for name in names}
    return alone | {"target_positions": at[here] - begin, "labels": micro["labels"][here]}


# ---- texts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_windows(sizes, reuse, spare, two_segments):
    """A text begins where the reuse part of the one before it ends, and the last one ends where its document does."""
    documents, tokenizer, spans = numbered([[size] for size in sizes])
    length = reuse + 5 + spare
    examples = objectives.build(
        "plm", documents, tokenizer, sequence_length=length, seed=1, reuse=reuse, memory=7,
        two_segments=two_segments, random_next=0.0,
    )  # fmt: skip
    follows, begins, ends = examples.follows(0), [], []
    assert follows is not None and (examples.follows(5) == follows).all()
    for i in range(len(examples)):
        example = examples[3, i]
        ids = example["input_ids"].tolist()
        assert len(ids) == examples.lengths(0)[i] == examples.lengths(3)[i] <= length
        text = [token for token in ids if token not in (tokenizer.sep_id, tokenizer.cls_id)]
        document = spans[document_of(text, spans)]
        if follows[i]:
            assert begins[-1] + reuse == text[0] and ends[-1] < document[-1]
        else:
            assert text[0] == document[0] and (i == 0 or ends[-1] in {span[-1] for span in spans})
        if follows[i + 1 : i + 2].any():
            # what is remembered of a text sees nothing behind it in the text
            assert (example["query_ranks"][:reuse] <= example["key_ranks"][reuse:].amin()).all()
        begins.append(text[0])
        ends.append(text[-1])
    assert ends[-1] == spans[-1][-1] and follows.sum() == len(examples) - len(sizes)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_as_the_whole_text_says():
    """With enough memory a step is the model on all reuse parts before the text and the text, in one sequence."""
    batches, vocab_size = batches_of([70, 55, 60], memory=1000, rows=3)
    model, memory = model_of(vocab_size, memory=1000), StreamMemory()
    history: dict[int, list[dict[str, Tensor]]] = {}
    longest = 0
    for number in range(batches.steps_per_epoch):
        step = batches[number]
        out = memory.call(model, step.micro_batches[0], step.streams[0])
        losses = []
        for row, (stream, behind) in enumerate(step.streams[0]):
            example = example_of(batches, number, row)
            parts = [*history.get(stream, [])[len(history.get(stream, [])) - behind :], example]
            assert len(parts) == behind + 1
            history[stream] = parts
            losses.append(_loss_of_concatenated(model, parts))
            longest = max(longest, behind)
        total = torch.stack([sum for sum, _ in losses]).sum() / sum(count for _, count in losses)
        assert_near(out.loss, total, 1e-5)
    assert longest >= 4


def _loss_of_concatenated(model: Transformer, parts: list[dict[str, Tensor]]) -> tuple[Tensor, int]:
    """The summed loss of the last part, after the reuse parts of those before, in whose order all that came before
    precedes; and its labels."""
    whole: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "token_type_ids", "query_ranks", "key_ranks")}
    for i, part in enumerate(parts):
        taken = slice(REUSE) if i + 1 < len(parts) else slice(None)
        for name, pieces in whole.items():
            pieces.append(part[name][taken] + (i * 100 if "ranks" in name else 0))
    labels = parts[-1]["labels"]
    out = model(
        **{name: torch.cat(pieces)[None] for name, pieces in whole.items()},
        target_positions=(parts[-1]["target_positions"] + REUSE * (len(parts) - 1))[None], labels=labels[None],
        num_items_in_batch=1,
    )  # fmt: skip
    return out.loss, len(labels)


def test_one_layer_remembers_the_last_tokens():
    """Memory of 5 of the 8 tokens: a layer's keys are these embeddings, and no more."""
    batches, vocab_size = batches_of([70], memory=5, rows=1)
    model, memory = model_of(vocab_size, memory=5, layers=1), StreamMemory()
    before: dict[str, Tensor] = {}
    for number in range(3):
        step = batches[number]
        out = memory.call(model, step.micro_batches[0], step.streams[0])
        example = example_of(batches, number, 0)
        if before:
            tail = {name: before[name][REUSE - 5 : REUSE] for name in before if name not in ("labels",)}
            shifted = {
                name: torch.cat([tail[name], example[name] + (100 if "ranks" in name else 0)])[None]
                for name in ("input_ids", "token_type_ids", "query_ranks", "key_ranks")
            }
            alone = model(
                **shifted, target_positions=example["target_positions"][None] + 5, labels=example["labels"][None]
            )
            assert_near(out.logits, alone.logits[0], 1e-5)
            assert_near(out.loss, alone.loss, 1e-5)
        before = example


@pytest.mark.parametrize("memory", [REUSE, 11, 6])
def test_hugging_faces_mems_step_by_step(memory, tmp_path):
    """Losses, memories and gradients of four steps of two streams; Hugging Face's model is given mems by hand."""
    batches, vocab_size = batches_of([60, 60], memory=memory, rows=2)
    ours = model_of(
        vocab_size, memory=memory, family="xlnet", norm_eps=1e-12, head_bias=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, summary="last", classifier="dense_tanh",
    )  # fmt: skip
    ours.save_pretrained(tmp_path)
    from transformers import XLNetLMHeadModel

    theirs = XLNetLMHeadModel.from_pretrained(tmp_path).eval()
    assert (theirs.config.mem_len, theirs.config.reuse_len) == (memory, REUSE)
    stream, mems = StreamMemory(), None
    for number in range(4):
        step = batches[number]
        out = stream.call(ours, step.micro_batches[0], step.streams[0], num_items_in_batch=step.items)
        rows = [example_of(batches, number, row) for row in range(2)]
        both = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
        labels = torch.stack([row["labels"] for row in rows])
        expected = theirs(
            both["input_ids"], token_type_ids=both["token_type_ids"], mems=mems, use_mems=True, labels=labels,
            perm_mask=(both["key_ranks"][:, None, :] >= both["query_ranks"][:, :, None]).float(),
            target_mapping=torch.nn.functional.one_hot(both["target_positions"], LENGTH).float(),
        )  # fmt: skip
        mems = expected.mems
        assert_near(out.loss, expected.loss, 1e-5)
        assert_near(out.mems.rows()[-1], mems[-1], 1e-5)
        for model, loss in ((ours, out.loss), (theirs, expected.loss)):
            model.zero_grad()
            loss.backward()
        got = gradients_as_theirs(ours)
        for name, gradient in gradients_of(theirs).items():
            assert_near(got[name], gradient, 1e-5, name)
    assert ours.config.family in FAMILIES


def test_text_before_a_text_is_seen_through_memory_only():
    """Of a text before, only tokens of the reuse part move the logits of the next, and without memory none do."""
    batches, vocab_size = batches_of([70], memory=REUSE, rows=1)
    model = model_of(vocab_size, memory=REUSE)
    first, second = batches[0], batches[1]

    def logits(place: int | None, *, with_memory: bool) -> Tensor:
        memory, micro = StreamMemory(), dict(first.micro_batches[0])
        if place is not None:
            micro["input_ids"] = micro["input_ids"].clone()
            micro["input_ids"][place] = 7 if micro["input_ids"][place] != 7 else 8
        memory.call(model, micro, first.streams[0])
        if with_memory:
            return memory.call(model, second.micro_batches[0], second.streams[0]).logits
        return model(**second.micro_batches[0]).logits

    with torch.no_grad():
        remembered, alone = (logits(None, with_memory=each) for each in (True, False))
        assert (remembered - alone).abs().amax(1).min() > 1e-3, "every prediction sees what is remembered"
        for place in range(LENGTH):
            moved = (logits(place, with_memory=True) - remembered).abs().amax(1)
            assert (moved > 1e-5).all() if place < REUSE else (moved == 0).all(), place
            assert torch.equal(logits(place, with_memory=False), alone)


def test_documents_begin_anew():
    """A text that begins a document is read as without memory, whatever its stream has read before."""
    batches, vocab_size = batches_of([40, 40, 40, 40], memory=16, rows=2)
    model, memory, anew = model_of(vocab_size, memory=16), StreamMemory(), 0
    for number in range(batches.steps_per_epoch):
        step = batches[number]
        out = memory.call(model, step.micro_batches[0], step.streams[0])
        sequences = torch.bucketize(
            step.micro_batches[0]["target_positions"], step.micro_batches[0]["cu_seqlens"][1:], right=True
        )
        for row, part in enumerate(step.streams[0]):
            example = {name: value[None] for name, value in example_of(batches, number, row).items()}
            alone = model(**example, return_logits=True).logits[0]
            same = bool(((out.logits[sequences == row] - alone).abs() < 1e-5).all())
            assert same == (part.behind == 0)
            anew += number > 0 and part.behind == 0
    assert anew >= 2


def test_micro_batches_and_ranks_have_their_own():
    """Two ranks, each with every second micro-batch, remember and learn together what one process does."""
    batches, vocab_size = batches_of([50, 80, 61, 47], memory=12, rows=1, accumulation=4)
    model = model_of(vocab_size, memory=12)
    one, ranks = StreamMemory(), [StreamMemory(), StreamMemory()]
    for number in range(batches.steps_per_epoch):
        step = batches[number]
        together = {}
        for name, memories in (("one", [one]), ("two", ranks)):
            model.zero_grad()
            for rank, memory in enumerate(memories):
                mine = zip(step.micro_batches[rank :: len(memories)], step.streams[rank :: len(memories)], strict=True)
                for micro, parts in mine:
                    memory.call(model, micro, parts, num_items_in_batch=step.items).loss.backward()
            together[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        for a, b in zip(*together.values(), strict=True):
            assert_near(b, a, 1e-6)
    states = [memory.state() for memory in ranks]
    assert not states[0].keys() & states[1].keys(), "a rank holds nothing of the other's"
    assert one.state().keys() == states[0].keys() | states[1].keys()
    for name, kept in one.state().items():
        assert torch.equal(kept, {**states[0], **states[1]}[name])
        assert kept.shape[0] == 3 and kept.shape[1] <= 12 and not kept.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": -1}, "memory must be 0 or more, got -1"),
        ({"memory": 6}, r"memory \(6\) is of the reuse part of earlier texts; give reuse too"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.options_of("plm", **options)


def test_memory_is_cut_into_sequences_and_joined_again():
    from llmengine.models.memory import Memory

    parts = [torch.randn(2, n, 4) for n in (3, 0, 5)]
    memory = Memory.join([parts[0], None, parts[2]], parts[0][:, :0])
    assert memory.lengths == (3, 0, 5) and [state.shape for state in memory.states] == [(8, 4), (8, 4)]
    for got, part in itertools.zip_longest(memory.split(), parts):
        assert torch.equal(got, part)
