"""Configs and tensors as published directories have them: what Transformers 4 wrote, what no model reads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmengine import Transformer, TransformerConfig
from llmengine.convert import FAMILIES
from llmengine.testing import assert_near

from .peers import SHAPES, VOCABULARY, gradients_as_theirs, gradients_of, hf_model, ours_of, random_ids

# What `to_json_string(use_diff=False)` of Transformers 4 wrote of every model, besides the model's own fields.
EVERY = {
    "_commit_hash": "0", "_num_labels": 2, "add_cross_attention": False, "bad_words_ids": None,
    "begin_suppress_tokens": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "is_decoder": False, "is_encoder_decoder": False,
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict_in_generate": False,
    "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torch_dtype": "float32", "torchscript": False, "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_config_of_transformers_4(family):
    own = transformers.AutoConfig.for_model(family, **SHAPES[family]).to_dict()
    fields = TransformerConfig.from_dict(FAMILIES[family].read_config(EVERY | own, ()))
    assert fields == TransformerConfig.from_dict(FAMILIES[family].read_config(own, ()))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("albert", {"layers_to_keep": []}),
        ("bart", {"force_bos_token_to_be_generated": True, "do_blenderbot_90_layernorm": False, "prefix": " "}),
        ("mbart", {"_num_labels": 3, "add_final_layer_norm": True, "normalize_before": True}),
        ("gpt_neo", {"tokenizer_class": "GPT2Tokenizer"}),
        ("llama", {"pad_token_id": -1, "max_sequence_length": 2048, "architectures": ["LLaMAForCausalLM"]}),
        ("bert", {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 24, "sliding_window": 32768}),
        ("marian", {"extra_pos_embeddings": VOCABULARY, "bad_words_ids": [[0]], "decoder_vocab_size": VOCABULARY})
    ],
)  # fmt: skip
def test_a_field_of_a_published_config(family, fields):
    TransformerConfig.from_dict(FAMILIES[family].read_config(SHAPES[family] | fields, ()))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {"is_decoder": True}),
        ("modernbert", {"is_decoder": True}),
        ("t5", {"tie_encoder_decoder": True}),
        ("llama", {"pruned_heads": {"0": [1]}}),
        ("qwen2", {"use_mrope": True}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("llama", {"quantization_config": {"bits": 4}}),
    ],
)
def test_other_mathematics_is_refused(family, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        FAMILIES[family].read_config(SHAPES[family] | fields, ())


def test_what_yarn_stretches_where_nothing_is_said():
    """The positions that the model has."""
    scaling = {"type": "yarn", "factor": 4.0}
    told = {**scaling, "original_max_position_embeddings": SHAPES["llama"]["max_position_embeddings"]}
    ours = [FAMILIES["llama"].read_config(SHAPES["llama"] | {"rope_scaling": each}, ()) for each in (scaling, told)]
    assert ours[0] == ours[1]


def test_whole_heads_that_turn_where_a_quarter_is_the_default(tmp_path):
    """GPT-NeoX: what is not said is a quarter, so that we must say it."""
    theirs, ids = hf_model("GPTNeoXForCausalLM", rotary_pct=1.0), random_ids(2, 9)
    ours_of(theirs, tmp_path).save_pretrained(tmp_path / "again")
    again = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "again")
    assert_near(again(ids).logits, theirs(ids).logits, 1e-5)
    unsaid = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    assert FAMILIES["gpt_neox"].read_config(SHAPES["gpt_neox"] | unsaid, ())["rotary"]["fraction"] == 0.25


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("T5ForConditionalGeneration", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
        ("BartForConditionalGeneration", "model.encoder.version"),
    ],
)
def test_a_tensor_that_no_model_reads(name, tensor, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {tensor: torch.ones(3)}, path, metadata={"format": "pt"})
    ids = random_ids(2, 5)
    assert torch.equal(
        Transformer.from_pretrained(tmp_path)(ids, labels=ids).loss, ours_of(theirs, tmp_path)(ids, labels=ids).loss
    )


def test_a_head_of_its_own_that_transformers_5_calls_tied(tmp_path):
    """T5 v1.1: of every T5, Transformers 5 writes tie_word_embeddings true; here with both tensors."""
    theirs = hf_model("T5ForConditionalGeneration", tie_word_embeddings=False)
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
    ours = ours_of(theirs, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    ids = random_ids(2, 5)
    assert_near(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss, 1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert_near(again(ids, labels=ids).loss, theirs(ids, labels=ids).loss, 1e-5)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "MBartForQuestionAnswering", "MarianMTModel"])
def test_words_apart_where_nothing_is_tied(name, tmp_path):
    """Without tie_word_embeddings, each side of BART has words of its own; of Marian too, where both share them."""
    theirs = hf_model(name, tie_word_embeddings=False)
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(2, 5)
    answers = {"start_positions": ids[:, 0] % 5, "end_positions": ids[:, 1] % 5}
    labels = answers if "Question" in name else {"labels": ids}
    expected, got = theirs(ids, **labels), ours(ids, **labels)
    assert_near(got.loss, expected.loss, 1e-5)
    expected.loss.backward()
    got.loss.backward()
    their_gradients = gradients_of(theirs)
    for key, gradient in gradients_as_theirs(ours).items():
        if key != "final_logits_bias":
            assert_near(gradient, their_gradients[key], 1e-5, key)
    ours.save_pretrained(tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert_near(again(ids, **labels).loss, expected.loss, 1e-5)


def test_a_token_head_with_an_activation_of_its_own(tmp_path):
    """RoBERTa's is gelu where the layers' is another: not computed, and said."""
    hf_model("RobertaForMaskedLM", hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act is 'relu'; llmengine computes only 'gelu'"):
        Transformer.from_pretrained(tmp_path)
