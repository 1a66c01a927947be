"""Eole's directories: the same logits as its formulas; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from llmengine import Transformer
from llmengine.testing import assert_near

from .translators import PAD, RIGHT, SOURCE_WORDS, TARGET, VOCABULARY, WORDS, Eole, check_words, logits_of

EOLE = {
    "tied": Eole(tied=True),
    "its own output embedding": Eole(activation="gelu", layers=(2, 2)),
    "two vocabularies": Eole(apart=True, activation="silu"),
    "no attention bias": Eole(attention_bias=False),
    "sines, then cosines": Eole(positions="SinusoidalConcat"),
    "learned positions": Eole(positions="Learned", tied=True),
}


def eole_directory(theirs: Eole, directory: Path, change: Callable[[dict], object] = bool, shards: int = 1) -> Path:
    """change: what it does to config.json."""
    directory.mkdir(exist_ok=True)
    config = theirs.config()
    change(config)
    source = [*VOCABULARY, *(f"s{i}" for i in range(SOURCE_WORDS - WORDS))] if theirs.apart else VOCABULARY
    specials = {"pad_token": "<blank>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {"src": source, "tgt": VOCABULARY, "decoder_start_token": "</s>", "specials": specials}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    tensors = theirs.file()
    for shard in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        safetensors.torch.save_file(part, directory / f"model.{shard:02}.safetensors")
    return directory


@pytest.mark.parametrize("name", EOLE)
def test_eole_translation(name, tmp_path):
    theirs = EOLE[name]
    ours = Transformer.from_pretrained(eole_directory(theirs, tmp_path / "run", shards=1 + theirs.apart))
    expected = theirs.logits(*theirs.state(), RIGHT, TARGET)
    assert_near(logits_of(ours, RIGHT, TARGET), expected[TARGET != PAD], 1e-5)
    config = ours.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 3)
    assert config.decoder_start_token_id == 3 and config.tie_embeddings == theirs.tied
    assert config.dropout == 0.1 and config.attention_dropout == 0.0
    check_words(ours, theirs.apart)
    ours.save_pretrained(tmp_path / "ours")
    again = Transformer.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again, RIGHT, TARGET), logits_of(ours, RIGHT, TARGET))


def test_eoles_options_of_both_sides_and_of_older_versions(tmp_path):
    """A side that says nothing takes what is said of both; versions before 0.2 have another epsilon."""

    def said_once(config: dict) -> None:
        model = config["model"]
        model |= model["encoder"] | {"eole_version": "0.1.2"}
        model["encoder"], model["decoder"] = {}, None

    old = Eole(eps=1e-6)
    ours = Transformer.from_pretrained(eole_directory(old, tmp_path / "old", said_once))
    assert ours.config.norm_eps == 1e-6
    expected = old.logits(*old.state(), RIGHT, TARGET)
    assert_near(logits_of(ours, RIGHT, TARGET), expected[TARGET != PAD], 1e-5)


def test_a_side_without_biases_that_the_other_has(tmp_path):
    """As some versions write add_qkvbias: output projections of the decoder alone have them. They count as zero."""
    theirs = Eole()
    run = eole_directory(theirs, tmp_path / "run")
    tensors = safetensors.torch.load_file(run / "model.00.safetensors")
    lost = [name for name in tensors if name.startswith("encoder.") and name.endswith("final_linear.bias")]
    state, generator = theirs.state()
    for name in lost:
        del tensors[name]
        state[name.replace("transformer_layers", "transformer")].zero_()
    safetensors.torch.save_file(tensors, run / "model.00.safetensors")
    ours = Transformer.from_pretrained(run)
    assert lost and ours.config.attention_bias
    expected = theirs.logits(state, generator, RIGHT, TARGET)
    assert_near(logits_of(ours, RIGHT, TARGET), expected[TARGET != PAD], 1e-5)


@pytest.mark.parametrize("scalars", [True, False])
def test_an_epsilon_that_nothing_tells_is_not_guessed(scalars, tmp_path):
    run = eole_directory(Eole(), tmp_path / "run", lambda config: config["model"].pop("eole_version"))
    tensors = safetensors.torch.load_file(run / "model.00.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if scalars or "layer_scalar" not in name}
    safetensors.torch.save_file(kept, run / "model.00.safetensors")
    if scalars:  # of versions whose epsilon is known
        assert Transformer.from_pretrained(run).config.norm_eps == 1e-5
        return
    with pytest.raises(ValueError, match=r'add "norm_eps" to its "model": 1e-06 if Eole 0\.1 wrote it'):
        Transformer.from_pretrained(run)


EOLE_REFUSED = {
    "rotary": (lambda c: c["model"]["embeddings"].update(position_encoding_type="Rotary"), "type is 'Rotary'"),
    "grouped heads": (
        lambda c: c["model"]["encoder"].update(heads_kv=2),
        "heads_kv is 2; llmengine computes only",
    ),
    "rms": (lambda c: c["model"]["decoder"].update(layer_norm="rms"), "layer_norm is 'rms'"),
    "gated": (lambda c: c["model"].update(mlp_activation_fn="gated-silu", encoder={}), "fn is 'gated-silu'"),
    "sides": (lambda c: c["model"]["decoder"].update(heads=2), "heads is 4 in the encoder and 2 in the decoder"),
    "decoder only": (lambda c: c["model"].update(architecture="transformer_lm"), "architecture is 'transformer_lm'"),
    "section": (lambda c: c["model"].update(encoder="transformer"), "\"encoder\" of config.json is 'transformer'"),
}


@pytest.mark.parametrize("name", EOLE_REFUSED)
def test_what_is_refused_of_eole(name, tmp_path):
    change, sentence = EOLE_REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        Transformer.from_pretrained(eole_directory(Eole(), tmp_path / "run", change))


def test_eoles_files_that_are_missing_or_scaled(tmp_path):
    run = eole_directory(Eole(), tmp_path / "run")
    tensors = safetensors.torch.load_file(run / "model.00.safetensors")
    tensors["decoder.transformer_layers.1.layer_scalar"] *= 2
    safetensors.torch.save_file(tensors, run / "model.00.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.transformer_layers\.1\.layer_scalar is \[2\.0\]"):
        Transformer.from_pretrained(run)
    (run / "model.00.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"run has no model\.00\.safetensors"):
        Transformer.from_pretrained(run)
