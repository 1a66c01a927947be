"""Every family against Hugging Face's model of equal random weights: logits, losses, gradients, generation, files."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from llmengine import Transformer
from llmengine.testing import assert_near

from .peers import family_of, gradients_as_theirs, gradients_of, hf_model, ours_of, padding_mask, random_ids

LENGTHS, LENGTH = [17, 9, 1, 13], 17
SOURCES, SOURCE = [11, 5, 2, 8], 11

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
ENCODERS = [
    ("BertForMaskedLM", {}),
    ("RobertaForMaskedLM", {}),
    ("XLMRobertaForMaskedLM", {}),
    ("AlbertForPreTraining", {}),
    ("AlbertForMaskedLM", {}),
    ("ElectraForMaskedLM", {}),
    ("ElectraForMaskedLM", {"embedding_size": 32}),
    ("ModernBertForMaskedLM", {}),
    ("ModernBertForMaskedLM", {"layer_types": ["sliding_attention"] * 4}),
    ("ModernBertForMaskedLM", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "decoder_bias": False}),
]
DECODERS = [
    ("OpenAIGPTLMHeadModel", {}),
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    ("GPTNeoForCausalLM", {}),
    ("GPTNeoXForCausalLM", {}),
    ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "attention_bias": False}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    ("LlamaForCausalLM", {"rope_parameters": YARN}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}}),
    ("MistralForCausalLM", {}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("Qwen2ForCausalLM", {}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", {}),
    ("GemmaForCausalLM", {}),
    ("Gemma2ForCausalLM", {}),
    ("Gemma3ForCausalLM", {}),
]
ENCODER_DECODERS = [
    ("BartForConditionalGeneration", {}),
    ("BartForConditionalGeneration", {"scale_embedding": True, "activation_function": "relu"}),
    ("BartForConditionalGeneration", {"decoder_attention_heads": 2, "decoder_ffn_dim": 40}),
    ("MBartForConditionalGeneration", {}),
    ("MarianMTModel", {"activation_function": "swish", "scale_embedding": True}),
    ("MarianMTModel", {"encoder_attention_heads": 8, "encoder_ffn_dim": 72}),
    ("MarianMTModel", {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 80}),
    (
        "MarianMTModel",
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 61, "tie_word_embeddings": False},
    ),
    ("T5ForConditionalGeneration", {}),
    ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
]
UNLABELLED = [
    ("BertModel", {}), ("RobertaModel", {}), ("AlbertModel", {}), ("ElectraModel", {}), ("ModernBertModel", {}),
    ("GPTNeoXModel", {}), ("LlamaModel", {}), ("Gemma3TextModel", {}), ("BartModel", {}), ("T5Model", {}),
]  # fmt: skip


def named(cases: list) -> pytest.MarkDecorator:
    names = ["-".join([name, *map(str, fields.values())])[:60] for name, fields in cases]
    return pytest.mark.parametrize(("name", "fields"), cases, ids=names)


def compare_gradients(ours: Transformer, theirs: torch.nn.Module) -> None:
    expected, got = gradients_of(theirs), gradients_as_theirs(ours)
    got = {name: value for name, value in got.items() if name != "final_logits_bias"}  # a buffer of theirs
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(got[name], gradient, 1e-5, name)


def padded(ids: Tensor, mask: Tensor | None, pad: int | None) -> Tensor:
    return ids if mask is None or pad is None else torch.where(mask == 1, ids, pad)


@pytest.mark.parametrize("side", ["none", "right"])
@named(ENCODERS)
def test_encoders(name, fields, side, tmp_path):
    theirs = hf_model(name, **fields)
    ours = ours_of(theirs, tmp_path)
    mask = padding_mask(side, LENGTHS, LENGTH)
    ids = padded(random_ids(4, LENGTH), mask, theirs.config.pad_token_id)
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4, ids, -100)
    batch = {"input_ids": ids, "labels": labels}
    if mask is not None:
        labels[mask == 0] = -100
        batch["attention_mask"] = mask
    if name == "AlbertForPreTraining":
        batch["sentence_order_label"] = torch.tensor([0, 1, 1, 0])
    expected, got = theirs(**batch), ours(**batch)
    real = torch.ones(4, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    logits = expected.prediction_logits if name == "AlbertForPreTraining" else expected.logits
    assert_near(got.logits[real], logits[real], 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)


# Hugging Face's GPT counts no columns under a mask on the left
@pytest.mark.parametrize(
    ("name", "fields", "side"),
    [
        pytest.param(name, fields, side, id="-".join([name, *map(str, fields.values()), side])[:70])
        for name, fields in DECODERS
        for side in ("none", "right", "left")
        if (name, side) != ("OpenAIGPTLMHeadModel", "left")
    ],
)
def test_decoders(name, fields, side, tmp_path):
    theirs = hf_model(name, **fields)
    ours = ours_of(theirs, tmp_path)
    mask = padding_mask(side, LENGTHS, LENGTH)
    ids = padded(random_ids(4, LENGTH), mask, 0)
    labels = ids.clone()
    batch = {"input_ids": ids, "labels": labels}
    real = torch.ones(4, LENGTH, dtype=torch.bool)
    if mask is not None:
        real = mask.bool()
        labels[~real] = -100
        batch["attention_mask"] = mask
    if side == "left":  # Hugging Face lets the last padding token predict the first real one; we do not
        labels[torch.arange(4), mask.argmax(1)] = -100
    expected, got = theirs(**batch), ours(**batch)
    assert_near(got.logits[real], expected.logits[real], 1e-5, "logits")
    loss = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_near(got.loss, loss, 1e-5, "loss")
    loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@named(ENCODER_DECODERS)
def test_encoder_decoders(name, fields, side, tmp_path):
    theirs = hf_model(name, **fields)
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.normal_()
    ours = ours_of(theirs, tmp_path)
    mask = padding_mask(side, SOURCES, SOURCE)
    source = padded(random_ids(4, SOURCE), mask, 0)
    labels = random_ids(4, LENGTH, seed=1)
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    batch = {"input_ids": source, "labels": labels} | ({} if mask is None else {"attention_mask": mask})
    expected, got = theirs(**batch), ours(**batch)
    assert_near(got.logits, expected.logits, 1e-5, "logits")
    assert_near(got.loss, expected.loss, 1e-5, "loss")
    real = torch.ones(4, SOURCE, dtype=torch.bool) if mask is None else mask.bool()
    memory, encoded = got.encoder_last_hidden_state, expected.encoder_last_hidden_state
    assert_near(memory[real], encoded[real], 1e-5)
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, theirs)
    # without the targets' padding
    length = torch.tensor(LENGTHS)[:, None]
    packed = {**batch, "decoder_attention_mask": (torch.arange(LENGTH) < length).long()}
    assert_near(ours(**packed).loss, expected.loss, 1e-5, "loss without padding")


@named(DECODERS)
def test_decoders_generate_as_hugging_face(name, fields, tmp_path):
    theirs = hf_model(name, seed=3, **fields)
    with torch.no_grad():
        theirs.get_input_embeddings().weight *= 2.0  # no two tokens tie
    ours = ours_of(theirs, tmp_path)
    mask = padding_mask("left", [5, 1, 8], 8)
    ids = torch.where(mask == 1, random_ids(3, 8, seed=2), 0)
    if "OpenAIGPT" in name:  # it counts columns, padding too
        ids, mask = random_ids(3, 8, seed=2), torch.ones(3, 8, dtype=torch.int64)
    for beams in (1, 3):
        options = {"max_new_tokens": 9, "num_beams": beams, "pad_token_id": 1, "eos_token_id": 60}
        expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **options)
        assert torch.equal(ours.generate(ids, mask, **options), expected), f"{beams} beams"


@named(ENCODER_DECODERS)
def test_encoder_decoders_generate_as_hugging_face(name, fields, tmp_path):
    if name.startswith("T5"):
        fields = fields | {"num_decoder_layers": 2}  # Hugging Face's cache has as many layers as the encoder
    theirs = hf_model(name, seed=3, **fields)
    with torch.no_grad():
        theirs.get_input_embeddings().weight *= 2.0
    ours = ours_of(theirs, tmp_path)
    mask = padding_mask("right", SOURCES, SOURCE)
    source = torch.where(mask == 1, random_ids(4, SOURCE, seed=2), 0)
    start = theirs.config.decoder_start_token_id
    prompt = {} if start is not None else {"decoder_input_ids": torch.full((4, 1), 7)}
    told = {} if start is not None else {"decoder_start_token_id": 7}
    if name.startswith("Marian"):
        told["bad_words_ids"] = [[theirs.config.pad_token_id]]  # as its published directories have it
    for beams in (1, 3):
        options = {"max_new_tokens": 9, "num_beams": beams, "pad_token_id": 1, "eos_token_id": 60}
        expected = theirs.generate(source, attention_mask=mask, do_sample=False, **options, **told)
        assert torch.equal(ours.generate(source, mask, **options, **prompt), expected), f"{beams} beams"


@named(ENCODERS + DECODERS + ENCODER_DECODERS + UNLABELLED)
def test_round_trips(name, fields, tmp_path):
    """theirs -> ours -> theirs: every tensor bit by bit, and their class loads our directory without a complaint."""
    theirs = hf_model(name, **fields)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert ours.config.family == family_of(name)
    ours.save_pretrained(tmp_path / "ours")
    cls = getattr(transformers, name)
    again, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    first, second = theirs.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    twice = Transformer.from_pretrained(tmp_path / "ours")
    assert twice.config == ours.config
    for (key, a), (_, b) in zip(ours.named_parameters(), twice.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    ids = random_ids(2, 7)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if ours.config.architecture == "encoder_decoder" else {})
    a, b = theirs.eval()(**inputs), again.eval()(**inputs)
    assert_near(b[0], a[0], 1e-6)
    assert_near(ours(**inputs)[0], a[0], 1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ModernBertForMaskedLM", "GPTNeoXForCausalLM"])
def test_rotary_positions_in_float64(name, tmp_path):
    """Angles are float32 in both toolkits, and made by different products: hence the tolerance."""
    theirs = hf_model(name).double()
    ours = ours_of(theirs, tmp_path, torch.float64)
    ids = random_ids(2, LENGTH)
    assert_near(ours(ids).logits, theirs(ids).logits, 1e-6)
