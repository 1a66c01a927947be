"""Preferences: losses from the papers' formulas, a reference that stays, exact batches, a model that learns them."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch

from llmengine import Transformer, tasks
from llmengine.objectives.likelihood import log_likelihoods
from llmengine.objectives.preference import Preference, PreferenceLoss

from .letters import letter_tokenizer, model_of, words_of_letters
from .test_chat import LETTER_TALK
from .tiny import assert_cut_is_no_matter, train

LOSSES = ("dpo", "ipo", "orpo", "simpo")
each_loss = pytest.mark.parametrize("loss", LOSSES)


def task_of(**options) -> tasks.Task:
    tokenizer = letter_tokenizer("$A", words="user assistant system")
    options = {"template": LETTER_TALK, "max_length": 32} | options
    return tasks.make("preference", tokenizer, [], **options)


def pairs(count: int) -> list[dict[str, str]]:
    """The word reversed is better than the word."""
    words = [word for word in words_of_letters(3 * count, 5) if word.split() != word.split()[::-1]]
    return [{"prompt": w, "chosen": " ".join(reversed(w.split())), "rejected": w} for w in words[:count]]


def sequence_log_probabilities(model, task, row) -> list[tuple[float, int]]:
    """Of the chosen and the rejected answer, from all logits, in float64."""
    found = []
    for side in ("chosen", "rejected"):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        ids, replies = task.template.encode(turns)
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = [i for i, is_reply in enumerate(replies) if is_reply]
        found.append((sum(float(logs[i - 1, ids[i]]) for i in places), len(places)))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def formula(loss: str, pi: list, ref: list, beta: float, *, smoothing: float = 0.0, gamma: float = 1.0) -> float:
    """A pair's loss as its paper has it. pi, ref: (log-probability, tokens) of both answers."""
    (w, n_w), (l, n_l) = pi  # noqa: E741
    h = (w - ref[0][0]) - (l - ref[1][0])
    if loss == "dpo":
        return -(1 - smoothing) * math.log(sigmoid(beta * h)) - smoothing * math.log(sigmoid(-beta * h))
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    p_w, p_l = math.exp(w / n_w), math.exp(l / n_l)
    if loss == "orpo":
        ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        return -math.log(p_w) - beta * math.log(sigmoid(math.log(ratio)))
    return -math.log(sigmoid(beta / n_w * w - beta / n_l * l - gamma))


def moved(model: Transformer) -> None:
    """Weights as if something had been learnt."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


@each_loss
def test_the_loss_is_the_papers(loss):
    rows, task = pairs(5), task_of(loss=loss, beta=0.7)
    learner = task.wrap(model_of(task, "decoder"))
    ref = [sequence_log_probabilities(learner.policy, task, row) for row in rows]
    moved(learner.policy)
    examples = task.examples(rows)
    batch = examples.collate(examples.made)
    assert examples.items(batch) == {"tokens": sum(n for row in ref for _, n in row), "sequences": 5}
    out = learner(**batch)
    pi = [sequence_log_probabilities(learner.policy, task, row) for row in rows]
    expected = [formula(loss, *each, 0.7) for each in zip(pi, ref, strict=True)]
    assert out.loss.item() == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert out.losses.keys() == {"preference"} and out.logits.shape == (5,)
    anew = task.wrap(learner.policy)(**batch).loss.item()
    assert (anew == pytest.approx(out.loss.item())) == (loss in ("orpo", "simpo")), "those have no reference"


def test_conservative_dpo():
    rows, task = pairs(4), task_of(label_smoothing=0.2)
    learner = task.wrap(model_of(task, "decoder"))
    ref = [sequence_log_probabilities(learner.policy, task, row) for row in rows]
    moved(learner.policy)
    examples = task.examples(rows)
    pi = [sequence_log_probabilities(learner.policy, task, row) for row in rows]
    expected = [formula("dpo", *each, 0.1, smoothing=0.2) for each in zip(pi, ref, strict=True)]
    assert learner(**examples.collate(examples.made)).loss.item() == pytest.approx(sum(expected) / 4, rel=1e-4)


@each_loss
def test_gradients_are_those_of_the_formula(loss):
    """In float64, and finite where an answer is certain."""
    torch.manual_seed(0)
    sums = (-3 * torch.rand(6, 2, dtype=torch.float64) - 0.1).requires_grad_()
    counts, reference = torch.randint(1, 5, (6, 2)), -3 * torch.rand(6, 2, dtype=torch.float64)
    one = PreferenceLoss(loss=loss)
    assert torch.autograd.gradcheck(lambda x: one.of_pairs(x, counts, reference)[0], (sums,))
    certain = torch.tensor([[0.0, -200.0], [-200.0, 0.0]], requires_grad=True)
    losses, margins = one.of_pairs(certain, counts[:2], torch.zeros(2, 2))
    losses.sum().backward()
    assert all(x.isfinite().all() for x in (losses, margins, certain.grad))


@each_loss
def test_accumulation_changes_nothing(loss):
    rows, task = pairs(10), task_of(loss=loss)
    learner = task.wrap(model_of(task, "decoder"))
    moved(learner.policy)
    assert_cut_is_no_matter(learner, task.examples(rows))


def test_packed_is_padded():
    rows, task = pairs(5), task_of()
    learner = task.wrap(model_of(task, "decoder"))
    moved(learner.policy)
    examples = task.examples(rows)
    packed = examples.collate(examples.made)
    bounds = packed["cu_seqlens"].tolist()
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([packed[name][a:b] for a, b in pairwise(bounds)], True, value)
        for name, value in (("input_ids", 0), ("labels", -100))
    )
    padded, other = learner(ids, labels, attention_mask=(ids != 0).long()), learner(**packed)
    torch.testing.assert_close(padded.loss, other.loss)
    torch.testing.assert_close(padded.logits, other.logits)
    sums, counts = log_likelihoods(learner.policy, packed["labels"], input_ids=packed["input_ids"],
                                   cu_seqlens=packed["cu_seqlens"], max_seqlen=packed["max_seqlen"])  # fmt: skip
    expected = [pair for row in rows for pair in sequence_log_probabilities(learner.policy, task, row)]
    torch.testing.assert_close(sums, torch.tensor([x for x, _ in expected], dtype=torch.float32))
    assert counts.tolist() == [n for _, n in expected]


@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_a_model_learns(reference, tmp_path):
    rows, task = pairs(24), task_of(reference=reference)
    model = model_of(task, "decoder")
    learner = task.wrap(model)
    assert learner.config is model.config and learner.words is model.words
    assert {name.partition(".")[0] for name, _ in learner.named_parameters()} == {"policy"}
    before = list(task.answers(model, rows))
    assert all(answer == {"margin": 0.0, "chosen": False} for answer in before), "the model is its reference"
    losses = train(learner, task.examples(rows), 40, lr=1e-3)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and losses[-1] < 0.3
    answers = list(task.answers(model, rows))
    assert answers == list(task.answers(learner, rows))
    judgement = task.judge(rows, answers)
    assert judgement.main == "accuracy" and judgement.scores["accuracy"].value == 1.0
    margins = [answer["margin"] for answer in answers]
    assert judgement.scores["margin"].value == pytest.approx(sum(margins) / 24)
    assert (learner.reference is None) == (reference == "precomputed"), "no longer needed, or kept"
    learner.save_pretrained(tmp_path)
    task.save(tmp_path)
    loaded, again = Transformer.from_pretrained(tmp_path), tasks.load(tmp_path, task.tokenizer)
    with pytest.warns(UserWarning, match="is not at hand"):
        answers = list(again.answers(loaded, rows))
    for row, answer in zip(rows, answers, strict=True):
        (w, _), (l, _) = sequence_log_probabilities(loaded, task, row)  # noqa: E741
        assert answer["margin"] == pytest.approx(0.1 * (w - l), rel=1e-3, abs=1e-5), "no reference"
    again.compare_with(model_of(task, "decoder"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = list(again.answers(loaded, rows))
    assert [answer["margin"] for answer in answers] == pytest.approx(margins, rel=1e-4, abs=1e-5)


def test_precomputed_is_live():
    """The same steps, whether the reference reads each batch or has read all before."""
    rows, weights = pairs(8), []
    for reference in ("live", "precomputed"):
        task = task_of(reference=reference)
        learner = task.wrap(model_of(task, "decoder"))
        train(learner, task.examples(rows), 5, batch_tokens=60)
        weights.append(dict(learner.named_parameters()))
    for name, parameter in weights[0].items():
        torch.testing.assert_close(parameter, weights[1][name], rtol=1e-4, atol=1e-6)


def test_rows_that_a_past_reference_did_not_read():
    rows, task = pairs(8), task_of(reference="precomputed")
    model = model_of(task, "decoder")
    learner = task.wrap(model)
    train(learner, task.examples(rows[:4]), 2)
    known = list(task.answers(model, rows[:4]))
    with pytest.warns(UserWarning, match="the model as it was before training is not at hand .*the margins of dpo"):
        mixed = list(task.answers(model, rows))
    assert known != mixed[:4], "all of them without a reference, rather than some"
    late = task.examples(rows[4:])
    with pytest.raises(ValueError, match="the reference model is gone"):
        learner(**late.collate(late.made))


def test_a_reference_follows_to_another_dtype():
    task = task_of()
    learner = task.wrap(model_of(task, "decoder")).to(torch.bfloat16)
    assert learner.reference.words.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in learner.reference.parameters())
    assert not learner.train().reference.training


def test_long_pairs_lose_as_much_of_their_prompt():
    task = task_of(max_length=8)
    rows = [{"prompt": "a b c d e f", "chosen": "a b", "rejected": "a b c d e f g h i j"},
            {"prompt": "a", "chosen": "b", "rejected": "c"}]  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 2 pairs are longer than 8 tokens"):
        examples = task.examples(rows)
    batch = examples.collate(examples.made[:1])
    tokens = task.tokenizer.decode(batch["input_ids"].tolist(), False)
    # user a b c d e f assistant: the last token stays
    assert tokens == "assistant a b </s> assistant a b c d e f g"
    with pytest.warns(UserWarning, match="1 of 1 pairs"):
        mild = task_of(max_length=8).examples([{"prompt": "a b c d", "chosen": "a", "rejected": "b c"}])
    batch = mild.collate(mild.made)
    assert task.tokenizer.decode(batch["input_ids"].tolist(), False) == (
        "a b c d assistant a </s> a b c d assistant b c </s>"
    )


def test_a_prompt_may_be_a_conversation():
    task = task_of()
    talk = [{"role": "system", "content": "j"}, {"role": "user", "content": "a"}]
    examples = task.examples([{"prompt": talk, "chosen": "a", "rejected": "b"}])
    batch = examples.collate(examples.made)
    assert task.tokenizer.decode(batch["input_ids"].tolist(), False).startswith("system j user a assistant a </s>")


@pytest.mark.filterwarnings("ignore:task 'preference'")
@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": "a", "rejected": "b"}, "row 1 has no 'prompt'"),
        ({"prompt": "a", "chosen": "a"}, "row 1 has no 'rejected'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "row 1: prompt is 3; expected a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no row has two different answers"),
    ],
)
def test_wrong_rows(row, message):
    with pytest.raises(ValueError, match=message):
        task_of().examples([row])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "kto"}, "loss 'kto' is not one of dpo, ipo, orpo, simpo"),
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for loss \"dpo\"; this is 'ipo'"),
        ({"reference": "none"}, "reference 'none' is not one of live, precomputed"),
        ({"max_length": 1}, "max_length must be 2 or more"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        task_of(**options)


def test_a_model_of_another_kind():
    task = task_of()
    with pytest.raises(ValueError, match="needs a decoder with objective 'clm'; this is 'encoder_decoder'"):
        Preference(model_of(task, "encoder_decoder"), PreferenceLoss())
