"""Fine-tuning heads of every family against Hugging Face's: logits, losses, gradients, files; several heads at once."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmengine import Transformer, TransformerConfig
from llmengine.testing import assert_near

from .peers import family_of, gradients_as_theirs, gradients_of, hf_model, ours_of, padding_mask, random_ids

LENGTHS, LENGTH, LABELS = [11, 5, 2, 8], 11, 3
SEQUENCE = [
    "BertForSequenceClassification", "RobertaForSequenceClassification", "AlbertForSequenceClassification",
    "ElectraForSequenceClassification", "ModernBertForSequenceClassification", "XLNetForSequenceClassification",
    "GPT2ForSequenceClassification", "OpenAIGPTForSequenceClassification", "GPTNeoForSequenceClassification",
    "GPTNeoXForSequenceClassification", "LlamaForSequenceClassification", "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification", "Qwen3ForSequenceClassification", "GemmaForSequenceClassification",
    "Gemma2ForSequenceClassification", "BartForSequenceClassification", "MBartForSequenceClassification",
    "T5ForSequenceClassification",
]  # fmt: skip
TOKENS = [
    "BertForTokenClassification", "RobertaForTokenClassification", "AlbertForTokenClassification",
    "ElectraForTokenClassification", "ModernBertForTokenClassification", "XLNetForTokenClassification",
    "GPT2ForTokenClassification", "GPTNeoXForTokenClassification", "LlamaForTokenClassification",
    "ElectraForPreTraining",
]  # fmt: skip
QUESTIONS = [
    "BertForQuestionAnswering", "RobertaForQuestionAnswering", "AlbertForQuestionAnswering",
    "ElectraForQuestionAnswering", "XLNetForQuestionAnsweringSimple", "GPT2ForQuestionAnswering",
    "BartForQuestionAnswering",
]  # fmt: skip
CHOICES = [
    "BertForMultipleChoice", "RobertaForMultipleChoice", "AlbertForMultipleChoice", "XLNetForMultipleChoice",
]  # fmt: skip
EOS = 2  # what Bart's and T5's classifiers read


def models(name: str, tmp_path, **fields) -> tuple[transformers.PreTrainedModel, Transformer]:
    theirs = hf_model(name, **{"pad_token_id": 0, **fields} if "Roberta" not in name else fields)
    return theirs, ours_of(theirs, tmp_path)


def batch_of(theirs) -> dict[str, torch.Tensor]:
    # XLNet's summary is the last column, where padding must not be
    mask = padding_mask("left" if theirs.config.model_type == "xlnet" else "right", LENGTHS, LENGTH)
    ids = torch.where(mask == 1, random_ids(4, LENGTH), theirs.config.pad_token_id)
    if theirs.config.is_encoder_decoder:
        ids[torch.arange(4), torch.tensor(LENGTHS) - 1] = EOS
    if family_of(type(theirs).__name__) == "openai-gpt":
        mask = torch.ones_like(mask)  # it attends padding; its classifier finds the last token by pad_token_id
        ids = random_ids(4, LENGTH)
    return {"input_ids": ids, "attention_mask": mask}


def compare_gradients(ours: Transformer, theirs: torch.nn.Module) -> None:
    expected, got = gradients_of(theirs), gradients_as_theirs(ours)
    unread = {name for name in expected if name not in got}  # parameters of theirs that nothing reads
    assert not any(expected[name].any() for name in unread), unread
    assert got.keys() <= expected.keys()
    for name, gradient in got.items():
        assert_near(gradient, expected[name], 1e-5, name)


def compare_files(ours: Transformer, theirs, tmp_path) -> None:
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert Transformer.from_pretrained(tmp_path / "ours").config == ours.config


# the other losses are the same code for every family
@pytest.mark.parametrize(
    ("name", "problem"), [(name, "single") for name in SEQUENCE] + [(SEQUENCE[0], "multi"), (SEQUENCE[1], "regression")]
)
def test_sequence_classification(name, problem, tmp_path):
    kinds = {"single": "single_label", "multi": "multi_label"}
    kind = "regression" if problem == "regression" else f"{kinds[problem]}_classification"
    theirs, ours = models(name, tmp_path / "theirs", num_labels=LABELS, problem_type=kind)
    assert (ours.config.n_labels, ours.config.problem) == (LABELS, problem)
    generator = torch.Generator().manual_seed(1)
    labels = {
        "single": torch.tensor([0, 2, 1, 1]),
        "multi": torch.randint(2, (4, LABELS), generator=generator).float(),
        "regression": torch.randn(4, LABELS, generator=generator),
    }[problem]
    batch = batch_of(theirs)
    expected, got = theirs(**batch, labels=labels), ours(**batch, labels=labels)
    assert_near(got.logits, expected.logits, 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    assert_near(ours(**batch, labels=labels, num_items_in_batch=8).loss, got.loss / 2, 1e-6)
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)
    compare_files(ours, theirs, tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_begins_with_its_start_on_whichever_side_padding_is(side, tmp_path):
    """Not with the padding before it: each source as alone, where positions are distances."""
    _, ours = models("T5ForSequenceClassification", tmp_path, decoder_start_token_id=7)
    mask = padding_mask(side, LENGTHS, LENGTH)
    ids = torch.where(mask == 1, random_ids(4, LENGTH), 0)
    alone = torch.cat([ours(row[real == 1][None]).logits for row, real in zip(ids, mask, strict=True)])
    assert_near(ours(ids, attention_mask=mask).logits, alone, 1e-5)
    assert_near(ours(ids.int(), attention_mask=mask.bool()).logits, alone, 1e-5)


@pytest.mark.parametrize("name", TOKENS)
def test_token_classification(name, tmp_path):
    theirs, ours = models(name, tmp_path / "theirs", num_labels=LABELS)
    batch = batch_of(theirs)
    labels = batch["input_ids"] % (2 if name == "ElectraForPreTraining" else LABELS)
    if name != "ElectraForPreTraining":
        labels = torch.where(batch["attention_mask"] == 1, labels, -100)
        labels[:, ::3] = -100
    expected, got = theirs(**batch, labels=labels), ours(**batch, labels=labels)
    real = batch["attention_mask"] == 1
    assert_near(got.logits[real], expected.logits[real], 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)
    compare_files(ours, theirs, tmp_path)


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_answering(name, tmp_path):
    theirs, ours = models(name, tmp_path / "theirs")
    ids = random_ids(4, LENGTH)
    ids[:, -1] = EOS
    batch = {"input_ids": ids}
    where = {"start_positions": torch.tensor([1, 0, 4, LENGTH + 3]), "end_positions": torch.tensor([3, 0, 4, LENGTH])}
    expected, got = theirs(**batch, **where), ours(**batch, **where)
    assert_near(got.start_logits, expected.start_logits, 1e-5, "start")
    assert_near(got.end_logits, expected.end_logits, 1e-5, "end")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)
    compare_files(ours, theirs, tmp_path)


@pytest.mark.parametrize("name", CHOICES)
def test_multiple_choice(name, tmp_path):
    theirs, ours = models(name, tmp_path / "theirs")
    batch = {key: value.view(2, 2, LENGTH) for key, value in batch_of(theirs).items()}
    labels = torch.tensor([1, 0])
    expected, got = theirs(**batch, labels=labels), ours(**batch, labels=labels)
    assert got.logits.shape == (2, 2) == ours(**batch).logits.shape
    assert_near(got.logits, expected.logits, 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)
    compare_files(ours, theirs, tmp_path)


# ---- beyond Hugging Face ---------------------------------------------------------------------------------------------

SEVERAL = ("mlm", "nsp", "classification", "tagging", "qa")


def several() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig.preset(
        "bert-tiny", vocab_size=61, objectives=list(SEVERAL), n_labels=LABELS, loss_weights={"tagging": 0.5, "qa": 2.0},
        dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0, family="custom",
    )  # fmt: skip
    return Transformer(config)


def test_several_heads_with_weights(tmp_path):
    model = several()
    ids = random_ids(4, LENGTH)
    batch = {
        "labels": {"mlm": ids, "classification": torch.tensor([0, 1, 2, 0]), "tagging": ids % LABELS},
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
        "start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 2, 5, 9]),
    }  # fmt: skip
    out = model(ids, **batch)
    assert set(out.losses) == set(SEVERAL)
    weights = {"tagging": 0.5, "qa": 2.0}
    assert_near(out.loss, sum(weights.get(name, 1.0) * loss for name, loss in out.losses.items()), 1e-6)
    assert out.head_logits["classification"].shape == (4, LABELS) and out.logits.shape == (4, LENGTH, 61)
    items = {"tokens": 4 * LENGTH, "sequences": 4}
    assert_near(model(ids, **batch, num_items_in_batch=items).loss, out.loss, 1e-6)
    with pytest.raises(ValueError, match=r"num_items_in_batch must be a dict"):
        model(ids, **batch, num_items_in_batch=4)
    with pytest.raises(ValueError, match=r"labels of \['rtd'\], but objectives are"):
        model(ids, labels={"rtd": ids})
    model.save_pretrained(tmp_path)
    assert_near(Transformer.from_pretrained(tmp_path)(ids, **batch).loss, out.loss, 1e-6)


def test_a_fresh_head_on_a_pretrained_backbone(tmp_path):
    """objectives and fields of from_pretrained: the backbone is the file's, the new head is N(0, init_std)."""
    theirs = hf_model("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(1)
    ours = Transformer.from_pretrained(tmp_path, objectives=["tagging"], n_labels=7, dtype=torch.bfloat16)
    head = ours.heads["tagging"].out
    assert head.weight.shape == (7, 32) and head.weight.dtype == torch.bfloat16
    assert 0.01 < head.weight.float().std() < 0.03 and not head.bias.any()
    assert torch.equal(ours.words.weight.float(), theirs.bert.embeddings.word_embeddings.weight.bfloat16().float())
    ours = Transformer.from_pretrained(
        tmp_path, objectives=["classification"], classifier="dense_tanh", family="custom"
    )
    assert ours(random_ids(2, 5)).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        ("classification", torch.tensor([0, 3]), r"labels holds 3; allowed: 0 to 2"),
        ("classification", torch.tensor([0]), r"labels has shape \(1,\); expected \(2,\)"),
        ("tagging", torch.zeros(2, 4, dtype=torch.int64), r"labels has shape \(2, 4\); expected that of input_ids"),
        ("tagging", torch.full((2, 5), 3), r"labels holds 3; allowed: 0 to 2 \(n_labels 3\), or -100"),
        ("classification", torch.tensor([0.5, 1.0]), "labels has dtype torch.float32"),
    ],
)
def test_wrong_labels_are_named(objective, labels, message):
    config = TransformerConfig.preset(
        "bert-tiny", vocab_size=61, objectives=[objective], n_labels=LABELS, family="custom"
    )
    with pytest.raises(ValueError, match=message):
        Transformer(config)(random_ids(2, 5), labels=labels)


def test_an_answer_outside_of_the_text_has_no_loss():
    """Beyond the batch, in padding of either side, in a packed batch beyond its sequence: as if it were -100."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset("bert-tiny", vocab_size=61, objectives=["qa"])).eval()
    ids, one = random_ids(2, 6), torch.tensor([2, -100])
    expected = model(ids[:1], start_positions=one[:1], end_positions=one[:1]).loss
    for side, places in (("right", (4, 6, -1)), ("left", (1, 6, -1))):
        mask = padding_mask(side, [6, 4], 6)
        for place in places:
            ends = torch.tensor([2, place])
            assert_near(model(ids, mask, start_positions=ends, end_positions=ends).loss, expected, 1e-6, side)
    bounds = {"cu_seqlens": torch.tensor([0, 6, 9]).int(), "max_seqlen": 6}
    ends = torch.tensor([2, 3])  # a place of the first sequence, not of the second
    assert_near(model(ids.flatten()[:9], **bounds, start_positions=ends, end_positions=ends).loss, expected, 1e-6)


def test_an_answer_has_two_ends():
    model = Transformer(TransformerConfig.preset("bert-tiny", vocab_size=61, objectives=["qa"]))
    with pytest.raises(ValueError, match="start_positions and end_positions go together"):
        model(random_ids(2, 5), start_positions=torch.tensor([1, 2]))


@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_accumulation_equals_one_batch(problem):
    """Each sequence alone, divided by the whole batch's count: the gradients of one batch."""
    torch.manual_seed(0)
    config = TransformerConfig.preset(
        "bert-tiny", vocab_size=61, objectives=["classification"], n_labels=LABELS, problem=problem, family="custom",
        dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    model = Transformer(config)
    ids = random_ids(4, LENGTH)
    labels = torch.tensor([0, 2, 1, 1]) if problem == "single" else (random_ids(4, LABELS) % 2).float()

    def gradients(parts: list[slice]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            model(ids[part], labels=labels[part], num_items_in_batch=4).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, split = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    for name, gradient in whole.items():
        assert_near(split[name], gradient, 1e-6, name)
