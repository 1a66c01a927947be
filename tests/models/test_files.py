"""Directories in and out: round trips with transformers, sharded and old files, what is refused, atomic writing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmengine import Transformer, TransformerConfig
from llmengine.testing import assert_near

from .peers import hf_model, ours_of, random_ids

CLASSES = ["BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertModel", "GPT2LMHeadModel"]
IDS = random_ids(2, 7)
CUSTOM = {
    "architecture": "encoder", "objectives": ["mlm"], "vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4,
    "d_ff": 48, "max_positions": 24, "activation": "silu", "tie_embeddings": False,
}  # fmt: skip


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype, name


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_through_hugging_face(name, dtype, tmp_path):
    """theirs -> ours -> theirs: every weight, bit by bit, and their class loads our directory without a complaint."""
    theirs = hf_model(name).to(dtype)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {dtype} and not ours.training
    ours.save_pretrained(tmp_path / "ours")
    again, report = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert_same_weights(again, theirs)
    assert_same_weights(Transformer.from_pretrained(tmp_path / "ours"), ours)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").architectures == [name]


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny"])
def test_a_fresh_model_loads_in_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset(name, vocab_size=61)).eval()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    logits = theirs(IDS).prediction_logits if name == "bert-tiny" else theirs(IDS).logits
    assert_near(model(IDS).logits, logits, 1e-5)
    tied = theirs.get_output_embeddings().weight
    assert tied is theirs.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_untied_output_embeddings(name, tmp_path):
    theirs = hf_model(name, tie_word_embeddings=False)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert not torch.equal(ours.token_head.weight, ours.words.weight)
    assert_near(ours(IDS).logits, theirs(IDS).logits, 1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_an_untied_backbone_has_no_head(tmp_path):
    for name in ("bert-tiny", "gpt-tiny"):
        config = TransformerConfig.preset(name, vocab_size=61, objectives=[], tie_embeddings=False)
        Transformer(config).save_pretrained(tmp_path)
        assert not any(key.startswith(("cls.", "lm_head.")) for key in load_file(tmp_path / "model.safetensors"))


def test_a_custom_model_round_trips(tmp_path):
    model = Transformer(TransformerConfig.from_dict(CUSTOM)).eval()
    model.save_pretrained(tmp_path / "a" / "b")
    again = Transformer.from_pretrained(tmp_path / "a" / "b")
    assert again.config == model.config
    assert_same_weights(again, model)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_sharded_files(tmp_path):
    theirs = hf_model("GPT2LMHeadModel")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    ours = Transformer.from_pretrained(tmp_path)
    assert_near(ours(IDS).logits, theirs(IDS).logits, 1e-5)
    # saving over shards: what is read back, by us and by them, is the new model
    with torch.no_grad():
        ours.words.weight += 1.0
    ours.save_pretrained(tmp_path)
    assert_same_weights(Transformer.from_pretrained(tmp_path), ours)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_near(again(IDS).logits, ours(IDS).logits, 1e-5)
    ours.save_pretrained(tmp_path / "fresh")
    (tmp_path / "fresh" / "model.safetensors").rename(tmp_path / "fresh" / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Transformer.from_pretrained(tmp_path / "fresh")


def test_objectives_choose_among_the_heads(tmp_path):
    theirs = hf_model("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    backbone = Transformer.from_pretrained(tmp_path, objectives=[])
    assert backbone.token_head is None and not backbone.heads
    assert_near(backbone(IDS).last_hidden_state, theirs.bert(IDS).last_hidden_state, 1e-5)
    mlm = Transformer.from_pretrained(tmp_path, objectives=["mlm"], dtype=torch.bfloat16)
    assert not mlm.heads and mlm.token_head.bias.dtype == torch.bfloat16
    with pytest.raises(ValueError, match='objectives: "clm" does not fit architecture "encoder"'):
        Transformer.from_pretrained(tmp_path, objectives=["clm"])


def test_names_of_the_first_bert_files(tmp_path):
    """gamma and beta for weight and bias, position_ids among the tensors, the decoder's second name for the bias."""
    theirs = hf_model("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_near(Transformer.from_pretrained(tmp_path)(IDS).logits, theirs(IDS).prediction_logits, 1e-5)
    tensors["cls.predictions.decoder.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.weight differs from .*, but they are one parameter"):
        Transformer.from_pretrained(tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------------------


def change_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


QKV = "transformer.h.1.attn.c_attn.weight"
BREAKS = {
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, r"has no model\.safetensors$"),
    "a pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        FileNotFoundError,
        r"pytorch_model\.bin are pickles, which can run code and are not read: load them in Hugging Face",
    ),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), ValueError, r"config\.json is not JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[1]"), ValueError, r"config\.json holds a list"),
    "truncated": (truncate, ValueError, r"model\.safetensors is not a whole safetensors file"),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 64), ValueError, "not a whole safetensors file"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), ValueError, "not a whole safetensors file"),
    "other model": (
        lambda d: change_config(d, model_type="t6"),
        ValueError,
        "model_type 't6' in .* is not one of bert",
    ),
    "unknown field": (lambda d: change_config(d, rotary=True), ValueError, "fields unknown to llmengine: rotary"),
    "other mathematics": (
        lambda d: change_config(d, add_cross_attention=True),
        ValueError,
        "add_cross_attention is True; llmengine computes only False",
    ),
    "other activation": (
        lambda d: change_config(d, activation_function="tanh"),
        ValueError,
        "activation_function is 'tanh'; llmengine computes gelu, ",
    ),
    "other shape": (
        lambda d: change_config(d, n_positions=23),
        ValueError,
        r"embeddings\.position\.weight in .* has shape \(24, 32\); its config\.json says \(23, 32\)",
    ),
    "fewer layers": (lambda d: change_config(d, n_layer=2), ValueError, r"unknown to llmengine: transformer\.h\.2\."),
    "missing tensor": (lambda d: change_tensors(d, lambda t: t.pop(QKV)), ValueError, f"lacks {QKV}"),
    "unknown tensor": (
        lambda d: change_tensors(d, lambda t: t.update({"transformer.extra": torch.ones(1)})),
        ValueError,
        r"tensors unknown to llmengine: transformer\.extra",
    ),
    "lost shard": (
        lambda d: (
            (d / "model.safetensors").rename(d / "other"),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}'),
        ),
        FileNotFoundError,
        r"lacks the shards model-1\.safetensors of model\.safetensors\.index\.json",
    ),
    "index without a map": (
        lambda d: (
            (d / "model.safetensors").rename(d / "other"),
            (d / "model.safetensors.index.json").write_text("{}"),
        ),
        ValueError,
        r"index\.json has no weight_map",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_directories_are_named(name, tmp_path):
    hf_model("GPT2LMHeadModel").save_pretrained(tmp_path)
    damage, error, message = BREAKS[name]
    damage(tmp_path)
    with pytest.raises(error, match=message):
        Transformer.from_pretrained(tmp_path)


def test_tensors_that_the_config_has_no_place_for_are_no_loss_in_silence(tmp_path):
    hf_model("LlamaForCausalLM", attention_bias=True).save_pretrained(tmp_path)
    change_config(tmp_path, attention_bias=False)
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.bias, .* for which a model of its config has no place"):
        Transformer.from_pretrained(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory with config\.json"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"save_pretrained: .*file is a file; give a directory"):
        Transformer(TransformerConfig.from_dict(CUSTOM)).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_place": "pre"}, "family \"bert\" cannot express norm_place 'pre' .*it has 'post'.*set family to"),
        ({"activation_dropout": 0.1}, "cannot express activation_dropout 0.1"),
        ({"embed_dropout": 0.3}, "cannot express embed_dropout 0.3 .*its hidden_dropout_prob is 0.1 already"),
    ],
)
def test_what_a_family_cannot_express_is_refused(fields, message, tmp_path):
    model = Transformer(TransformerConfig.preset("bert-tiny", vocab_size=61, **fields))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    Transformer(model.config.replace(family="custom")).save_pretrained(tmp_path / "x")


# ---- atomic writing --------------------------------------------------------------------------------------------------


def test_files_are_replaced_whole_and_nothing_is_left_behind(tmp_path):
    model = Transformer(TransformerConfig.from_dict(CUSTOM))
    (tmp_path / "notes.txt").write_text("keep me")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


KILLED = """
    import os, signal, sys
    import torch
    from llmengine import Transformer
    from llmengine.convert import files

    model = Transformer.from_pretrained(sys.argv[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    place, whole = sys.argv[2], files.save_file

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors, path, **kwargs):
        whole(tensors, path, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    if place == "while writing":
        files.save_file = half
    elif place == "before replacing":
        os.replace = die
    model.save_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("place", ["while writing", "before replacing"])
def test_a_kill_leaves_the_old_files_whole(place, tmp_path):
    model = Transformer(TransformerConfig.from_dict(CUSTOM)).eval()
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), place]
    done = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert_same_weights(Transformer.from_pretrained(tmp_path), model)
    done = subprocess.run([*script[:-1], "never"], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert all((p == 7.0).all() for p in Transformer.from_pretrained(tmp_path).parameters())


def test_a_failure_to_write_leaves_no_trace(tmp_path, monkeypatch):
    from llmengine.convert import files

    model = Transformer(TransformerConfig.from_dict(CUSTOM))
    model.save_pretrained(tmp_path)

    def full(*args, **kwargs):  # safetensors has an error of its own
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(directory)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
