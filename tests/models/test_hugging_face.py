"""Against Hugging Face models with equal weights: logits, losses and every gradient."""

from __future__ import annotations

import pytest
import torch

from .peers import gradients_as_theirs, gradients_of, hf_model, ours_of, padding_mask, random_ids

LENGTHS, LENGTH = [17, 9, 1, 13], 17
SIDES = ["none", "right", "left"]
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"])


def close(ours, theirs, tolerance, what=""):
    """Within tolerance of the largest value, or of 1."""
    scale = max(1.0, theirs.abs().max().item())
    error = (ours - theirs).abs().max().item()
    assert error <= tolerance * scale, f"{what}: {error:.2e} > {tolerance:.0e} x {scale:.2g}"


def mlm_batch(side: str) -> dict[str, torch.Tensor]:
    ids = random_ids(4, LENGTH)
    mask = padding_mask(side, LENGTHS, LENGTH)
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4, ids, -100)
    if mask is not None:
        labels[mask == 0] = -100
    batch = {"input_ids": ids, "labels": labels, "token_type_ids": ids % 3}
    return batch if mask is None else {**batch, "attention_mask": mask}


def compare_gradients(ours, theirs, tolerance):
    expected = gradients_of(theirs)
    got = gradients_as_theirs(ours)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        close(got[name], gradient, tolerance, name)


@precisions
@pytest.mark.parametrize("side", SIDES)
def test_bert_for_pretraining(side, dtype, tolerance, tmp_path):
    theirs = hf_model("BertForPreTraining").to(dtype)
    ours = ours_of(theirs, tmp_path)
    batch = mlm_batch(side)
    # where a batch is padded on the left, Hugging Face pools a padding token and we the first real one
    pairs = torch.tensor([0, 1, 1, -100]) if side != "left" else torch.full((4,), -100)
    expected = theirs(**{k: v for k, v in batch.items() if k != "labels"})
    got = ours(**batch, next_sentence_label=pairs)
    real = batch.get("attention_mask", torch.ones(4, LENGTH)).bool()
    close(got.prediction_logits[real], expected.prediction_logits[real], tolerance, "prediction_logits")
    assert (got.prediction_logits[~real] == 0).all()
    if side != "left":
        close(got.seq_relationship_logits, expected.seq_relationship_logits, tolerance, "seq_relationship_logits")
        loss = theirs(**batch, next_sentence_label=pairs).loss
    else:
        loss = torch.nn.functional.cross_entropy(expected.prediction_logits[real], batch["labels"][real])
    close(got.loss, loss, tolerance, "loss")
    assert torch.equal(got.loss, got.losses["mlm"] + got.losses["nsp"])
    loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs, tolerance)


@precisions
@pytest.mark.parametrize("side", SIDES)
def test_gpt2(side, dtype, tolerance, tmp_path):
    theirs = hf_model("GPT2LMHeadModel").to(dtype)
    ours = ours_of(theirs, tmp_path)
    ids, mask = random_ids(4, LENGTH), padding_mask(side, LENGTHS, LENGTH)
    labels = ids.clone()
    labels[1, 12:15] = -100
    if mask is not None:
        labels[mask == 0] = -100
    if side == "left":
        # Hugging Face lets the last padding token predict the first real one; we do not
        labels[torch.arange(4), mask.argmax(1)] = -100
    masked = {} if mask is None else {"attention_mask": mask}
    expected = theirs(ids, labels=labels, **masked)
    got = ours(ids, labels=labels, **masked)
    real = torch.ones(4, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    close(got.logits[real], expected.logits[real], tolerance, "logits")
    # Hugging Face's own loss casts to float32
    loss = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(loss, expected.loss, 1e-6)
    close(got.loss, loss, tolerance, "loss")
    loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
        ("BertForMaskedLM", {"hidden_act": "relu"}),
        ("BertForMaskedLM", {"hidden_act": "relu2"}),
        ("GPT2LMHeadModel", {"activation_function": "silu", "n_inner": None}),
        ("GPT2LMHeadModel", {"activation_function": "gelu"}),
    ],
)
def test_activations(name, fields, tmp_path):
    theirs = hf_model(name, **fields)
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 11)
    close(ours(ids).logits, theirs(ids).logits, 1e-5)


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_hidden_states(name, tmp_path):
    theirs = hf_model(name)
    ours = ours_of(theirs, tmp_path)
    ids, mask = random_ids(3, LENGTH), padding_mask("right", [17, 5, 8], LENGTH)
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    got = ours(ids, attention_mask=mask, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected) == 4
    for i, (state, other) in enumerate(zip(got.hidden_states, expected, strict=True)):
        close(state[mask == 1], other[mask == 1], 1e-5, f"hidden_states[{i}]")
    assert torch.equal(got.last_hidden_state, got.hidden_states[-1])


def test_bert_model_pools(tmp_path):
    theirs = hf_model("BertModel")
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(3, 8)
    close(ours(ids).pooler_output, theirs(ids).pooler_output, 1e-5)
    assert ours(ids).keys() == list(theirs(ids).keys())


def test_position_ids(tmp_path):
    theirs = hf_model("GPT2LMHeadModel")
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 6)
    for positions in (torch.arange(6).flip(0)[None], torch.tensor([[3, 1, 2, 0, 5, 5], [9, 8, 7, 23, 0, 1]])):
        close(ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits, 1e-5)


def test_num_items_in_batch_is_hugging_faces(tmp_path):
    theirs = hf_model("GPT2LMHeadModel")
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 6)
    for items in (7, torch.tensor(13)):
        expected = theirs(ids, labels=ids, num_items_in_batch=items).loss
        close(ours(ids, labels=ids, num_items_in_batch=items).loss, expected, 1e-5)


def test_output_answers_as_hugging_faces(tmp_path):
    theirs = hf_model("BertForPreTraining")
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 6)
    batch = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.tensor([0, 1])}
    expected, got = theirs(**batch), ours(**batch)
    assert list(got) == list(expected.keys()) and len(got) == 3
    assert torch.equal(got[0], got.loss) and torch.equal(got["loss"], got.loss)
    close(got[1], expected[1], 1e-5)
    assert [t.shape for t in got[1:]] == [t.shape for t in expected[1:]]
    assert got["logits"] is got["prediction_logits"] and "hidden_states" not in got
    with pytest.raises(KeyError):
        got["attentions"]
    with pytest.raises(AttributeError, match="fields: loss"):
        got.attentions  # noqa: B018
