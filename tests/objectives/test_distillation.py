"""Distillation beside Hinton's formula, and what a teacher cannot teach."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llmengine import Transformer, TransformerConfig
from llmengine.data.tokenizer import Tokenizer
from llmengine.objectives.distillation import Distilled, check_vocabulary

SMALL = {"vocab_size": 61, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 24, "max_positions": 20, "dropout": 0.0,
         "embed_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0, "pooler": "none"}  # fmt: skip


def model(seed: int, objective: str, preset: str = "bert-tiny", **fields) -> Transformer:
    torch.manual_seed(seed)
    fields = {"classifier": "linear", **fields}
    made = Transformer(TransformerConfig.preset(preset, **{**SMALL, **fields}, objectives=[objective]))
    with torch.no_grad():  # as of trained models, which say different things
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made.train()


def batch(objective: str, first: int = 0, last: int = 4) -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (4, 6), generator=generator)
    if objective == "classification":
        return {"input_ids": ids[first:last], "labels": torch.tensor([0, 2, -100, 1])[first:last]}
    return {"input_ids": ids[first:last], "labels": torch.where(ids % 3 == 0, -100, ids)[first:last]}


@pytest.mark.parametrize("objective", ["classification", "mlm"])
@pytest.mark.parametrize("weight, temperature", [(0.3, 2.0), (1.0, 0.5)])
def test_gradients_are_those_of_the_formula(objective, weight, temperature):
    fields = {"n_labels": 3} if objective == "classification" else {}
    student, teacher = model(1, objective, **fields), model(2, objective, n_layers=3, **fields)
    given = batch(objective)
    labelled = given["labels"] != -100
    said, told = (each(**given, return_logits=True).logits[labelled] for each in (student, teacher.eval()))
    # the paper's cross-entropy with soft targets differs from KL by the teacher's entropy: a constant
    soft = -(told.detach() / temperature).softmax(-1) * (said / temperature).log_softmax(-1)
    soft = weight * temperature**2 * soft.sum() / labelled.sum()
    own = functional.cross_entropy(said, given["labels"][labelled])
    wanted = torch.autograd.grad(soft + (1 - weight) * own, list(student.parameters()))
    out = Distilled(student, student, teacher, weight=weight, temperature=temperature)(**given)
    found = torch.autograd.grad(out.loss, list(student.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert out.losses["distillation"].item() > 0
    torch.testing.assert_close(sum(out.losses.values()), out.loss)
    torch.testing.assert_close(out.losses[objective], (1 - weight) * own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective, count", [("classification", 3), ("mlm", None)])
def test_micro_batches_add_up(objective, count):
    fields = {"n_labels": 3} if objective == "classification" else {}
    student, teacher = model(1, objective, **fields), model(2, objective, **fields)
    distilled = Distilled(student, student, teacher, weight=0.5, temperature=2.0)
    count = count or int((batch(objective)["labels"] != -100).sum())
    items = {"sequences": count, "tokens": count}
    parts = [distilled(**batch(objective, *cut), num_items_in_batch=items).loss for cut in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(parts), distilled(**batch(objective)).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["padded", "packed", "given"])
def test_a_teacher_reads_the_targets_as_the_student_does(kind):
    """Both begin with the student's token, whatever the teacher's config says."""
    student = model(1, "seq2seq", "bart-tiny")
    teacher = model(2, "seq2seq", "bart-tiny", decoder_start_token_id=7)
    source, target = batch("mlm")["input_ids"], torch.arange(3, 23).view(4, 5)
    labels = torch.where(torch.arange(5) < torch.tensor([[5], [3], [4], [5]]), target, -100)
    start = student.config.decoder_start_token_id
    read = {"input_ids": source, "decoder_input_ids": torch.cat([torch.full((4, 1), start), target[:, :-1]], 1)}
    said, told = (each(**read).logits[labels != -100].log_softmax(-1) for each in (student, teacher.eval()))
    wanted = (told.exp() * (told - said)).sum() / len(said)
    given = {"input_ids": source, "labels": labels}
    if kind == "given":
        given = read | given
    elif kind == "packed":
        given = {
            "input_ids": source.flatten(), "cu_seqlens": torch.arange(0, 25, 6).int(), "max_seqlen": 6,
            "labels": labels[labels != -100], "decoder_cu_seqlens": torch.tensor([0, 5, 8, 12, 17]).int(),
            "decoder_max_seqlen": 5,
        }  # fmt: skip
    found = Distilled(student, student, teacher, weight=1.0, temperature=1.0)(**given).loss
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_student_that_says_the_same_has_nothing_to_learn():
    student, teacher = (model(1, "mlm") for _ in range(2))
    out = Distilled(student, student, teacher, weight=1.0, temperature=3.0)(**batch("mlm"))
    assert abs(out.loss.item()) < 1e-5
    out.loss.backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-4


def test_the_teacher_is_no_part_of_what_is_trained():
    student, teacher = model(1, "mlm"), model(2, "mlm", dropout=0.5, embed_dropout=0.5)
    distilled = Distilled(student, student, teacher, weight=0.5, temperature=1.0).train()
    assert len(list(distilled.parameters())) == len(list(student.parameters()))
    assert set(distilled.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(distilled(**batch("mlm")).loss, distilled(**batch("mlm")).loss)


def test_the_teachers_classes_may_come_in_another_order():
    student, teacher = (model(1, "classification", n_labels=3) for _ in range(2))
    order = [2, 0, 1]
    with torch.no_grad():
        for parameter in teacher.heads.parameters():
            parameter.copy_(parameter[torch.tensor(order).argsort()])
    out = Distilled(student, student, teacher, weight=1.0, temperature=1.0, order=order)(**batch("classification"))
    assert abs(out.loss.item()) < 1e-6


@pytest.mark.parametrize(
    "objective, fields, sentence",
    [
        ("mlm", {}, r"objectives is \('mlm',\), the student's is \('classification',\)"),
        ("classification", {"n_labels": 4}, "n_labels is 4, the student's is 3"),
        ("classification", {"n_labels": 3, "problem": "multi"}, "problem is 'multi'"),
    ],
)
def test_a_teacher_of_something_else(objective, fields, sentence):
    student = model(1, "classification", n_labels=3)
    with pytest.raises(ValueError, match=sentence):
        Distilled(student, student, model(2, objective, **fields), weight=0.5, temperature=1.0)


def test_a_teacher_of_another_vocabulary():
    one, other = (Tokenizer.train([text * 5], "wordpiece", 64) for text in ("the cat sat. ", "a dog ran. "))
    check_vocabulary(one, one)
    with pytest.raises(ValueError, match=r"teacher: its vocabulary is another one: '.*' has the id .* tokens differ"):
        check_vocabulary(one, other)
