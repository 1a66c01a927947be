"""Names of classes in configs and files, and pretrained models of each family with fresh heads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from llmengine import Transformer, TransformerConfig

from .peers import hf_model, ours_of, random_ids

NAMES = ("bad", "so-so", "good")
HEADS = {
    "SequenceClassification": "classification", "TokenClassification": "tagging", "QuestionAnswering": "qa",
    "MultipleChoice": "choice",
}  # fmt: skip
# a pretraining class, and the fine-tuning classes that a model begun from its file is saved as
FRESH = {
    "BertForPreTraining": "Bert SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "BertForMaskedLM": "Bert SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "BertModel": "Bert SequenceClassification TokenClassification",
    "RobertaForMaskedLM": "Roberta SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "AlbertForMaskedLM": "Albert SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "ElectraForPreTraining": "Electra SequenceClassification TokenClassification QuestionAnswering",
    "ModernBertForMaskedLM": "ModernBert SequenceClassification TokenClassification",
    "XLNetLMHeadModel": "XLNet SequenceClassification TokenClassification",
    "GPT2LMHeadModel": "GPT2 SequenceClassification TokenClassification QuestionAnswering",
    "LlamaForCausalLM": "Llama SequenceClassification TokenClassification",
    "Qwen3ForCausalLM": "Qwen3 SequenceClassification",
    "BartForConditionalGeneration": "Bart SequenceClassification QuestionAnswering",
    "T5ForConditionalGeneration": "T5 SequenceClassification",
}


def config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "RobertaForTokenClassification", "LlamaForSequenceClassification",
             "BartForSequenceClassification", "T5ForSequenceClassification"],
)  # fmt: skip
def test_names_of_classes_in_files(name, tmp_path):
    names = dict(enumerate(NAMES))
    theirs = hf_model(name, id2label=names, label2id={n: i for i, n in names.items()}, pad_token_id=0)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert (ours.config.labels, ours.config.n_labels) == (NAMES, 3)
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").config
    assert again.id2label == names and again.label2id == {n: i for i, n in names.items()}
    assert Transformer.from_pretrained(tmp_path / "ours").config == ours.config


def test_default_names_are_none(tmp_path):
    ours = ours_of(hf_model("BertForSequenceClassification", num_labels=3), tmp_path)
    assert (ours.config.labels, ours.config.n_labels) == (None, 3)
    ours.save_pretrained(tmp_path)
    assert config(tmp_path)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    more = ours_of(hf_model("BertForSequenceClassification", num_labels=12), tmp_path)
    assert (more.config.labels, more.config.n_labels) == (None, 12), "ids are numbers, not texts in their order"


def test_names_in_our_own_layout(tmp_path):
    shape = {"vocab_size": 61, "d_model": 32, "n_heads": 4, "d_ff": 48, "family": "custom"}
    fields = TransformerConfig.preset("bert-tiny", objectives=["tagging"], n_labels=3, labels=list(NAMES), **shape)
    assert fields.labels == NAMES and fields.to_dict()["labels"] == list(NAMES)
    Transformer(fields).save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config == fields


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label names the classes \[0, 2\]; expected 0 to 1"),
        ({"id2label": {"0": "a", "1": "a"}}, r"labels \['a', 'a'\] names one twice"),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, r"num_labels is 3, but id2label has 2 names"),
    ],
)
def test_contradictions_in_files(changed, message, tmp_path):
    hf_model("BartForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(tmp_path) | changed))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_labels": 2, "labels": NAMES}, r"labels has 3 names for n_labels 2"),
        ({"n_labels": 2, "labels": ("a", "a")}, r"labels \['a', 'a'\] names one twice"),
        ({"labels": (1, 2)}, r"labels.0: Input should be a valid string, got 1"),
        (
            {"preset": "gpt-tiny", "summary": "first", "family": "custom"},
            'summary "first" is a token that sees no other in a decoder',
        ),
    ],
)
def test_contradictions_in_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({"preset": "bert-tiny", "objectives": ["classification"], **fields})


@pytest.mark.parametrize("name", FRESH)
def test_fresh_heads_are_those_of_the_family(name, tmp_path):
    """The file's weights, a fresh head, and a directory that transformers loads with nothing missing or left over."""
    theirs = hf_model(name, **({"pad_token_id": 0} if "Roberta" not in name else {}))
    theirs.save_pretrained(tmp_path / "theirs")
    before = Transformer.from_pretrained(tmp_path / "theirs")
    prefix, *classes = FRESH[name].split()
    for head in classes:
        labels = {} if HEADS[head] in ("qa", "choice") else {"labels": NAMES, "n_labels": 3}
        torch.manual_seed(1)
        ours = Transformer.from_pretrained(tmp_path / "theirs", objectives=[HEADS[head]], **labels)
        assert torch.equal(ours.words.weight, before.words.weight)
        assert ours(random_ids(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.int64)).head_logits
        ours.save_pretrained(tmp_path / "ours")
        cls = getattr(transformers, f"{prefix}For{head}")
        again, loading = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"], (head, loading)
        assert Transformer.from_pretrained(tmp_path / "ours").config == ours.config
        if labels:
            assert tuple(again.config.id2label.values()) == NAMES


def test_a_head_of_the_file_stays(tmp_path):
    """Beside a fresh one, whose classes have the names that were given, or none."""
    shape = {"vocab_size": 61, "d_model": 32, "n_heads": 4, "d_ff": 48, "family": "custom"}
    fields = TransformerConfig.preset("bert-tiny", objectives=["tagging"], n_labels=3, labels=list(NAMES), **shape)
    model = Transformer(fields)
    model.save_pretrained(tmp_path)
    both = Transformer.from_pretrained(tmp_path, objectives=["tagging", "classification"])
    assert torch.equal(both.heads["tagging"].out.weight, model.heads["tagging"].out.weight)
    assert both.config.labels is None and both.heads["classification"].out.weight.shape == (3, 32)
