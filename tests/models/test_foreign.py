"""Files of Fairseq and OpenNMT-py: the same logits as their formulas and as Hugging Face's; what is refused."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from llmengine import Transformer
from llmengine.testing import assert_near

from .peers import hf_model, random_ids
from .translators import (
    HEADS,
    INNER,
    LEFT,
    PAD,
    RIGHT,
    SOURCE_WORDS,
    TARGET,
    VOCABULARY,
    WIDTH,
    WORDS,
    Fairseq,
    OpenNMT,
    check_words,
    logits_of,
)  # fmt: skip


def of_file(path: Path, content: object) -> Transformer:
    torch.save(content, path)
    return Transformer.from_pretrained(path)


# ---- Fairseq ---------------------------------------------------------------------------------------------------------

FAIRSEQ = {
    "translation": Fairseq(),
    "pre-LN": Fairseq(pre_norm=True),
    "learned positions": Fairseq(learned=True, activation="gelu", scaled=False),
    "pre-LN, normed embeddings": Fairseq(pre_norm=True, learned=True, embed_norm=True),
    "its own output embedding": Fairseq(tied=False, embed_norm=True),
    "two dictionaries": Fairseq(apart=True),
    "two dictionaries, its own output embedding": Fairseq(apart=True, tied=False, pre_norm=True),
}


@pytest.mark.parametrize("name", FAIRSEQ)
@pytest.mark.parametrize("source", [LEFT, RIGHT], ids=["left", "right"])
def test_fairseq_translation(name, source, tmp_path):
    theirs = FAIRSEQ[name]
    state = theirs.state()
    ours = of_file(tmp_path / "model.pt", {"args": theirs.options(), "model": state, "extra_state": {"epoch": 3}})
    assert_near(logits_of(ours, source, TARGET), theirs.logits(state, source, TARGET)[TARGET != PAD], 1e-5)
    assert ours.config.tie_embeddings == theirs.tied and ours.config.decoder_start_token_id == 2
    assert (ours.token_head.weight is None) == theirs.tied
    check_words(ours, theirs.apart)
    ours.save_pretrained(tmp_path / "ours")
    again = Transformer.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again, source, TARGET), logits_of(ours, source, TARGET))


def test_fairseq_options_of_newer_files(tmp_path):
    """A Namespace or sections under cfg, instead of one Namespace."""
    theirs = Fairseq(pre_norm=True)
    state, options = theirs.state(), vars(theirs.options())
    sections = {"encoder": {}, "decoder": {}}
    for key, value in options.items():
        side, _, rest = key.partition("_")
        if side in sections:
            sections[side][rest] = value
        else:
            sections[key] = value
    expected = theirs.logits(state, LEFT, TARGET)[TARGET != PAD]
    for model in (argparse.Namespace(**options), sections):
        ours = of_file(tmp_path / "model.pt", {"args": None, "cfg": {"model": model}, "model": state})
        assert_near(logits_of(ours, LEFT, TARGET), expected, 1e-5)


def as_first_versions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values fused; norms numbered; the position table stored."""
    old = {}
    norms = {
        "encoder": ["self_attn_layer_norm", "final_layer_norm"],
        "decoder": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    }
    for name, tensor in state.items():
        if found := re.match(r"(.*attn)\.q_proj\.(weight|bias)$", name):
            stem, kind = found.groups()
            old[f"{stem}.in_proj_{kind}"] = torch.cat([state[f"{stem}.{part}_proj.{kind}"] for part in "qkv"])
        elif found := re.match(r"(encoder|decoder)(\.layers\.\d+)\.(\w+_layer_norm)\.(\w+)$", name):
            side, layer, norm, kind = found.groups()
            old[f"{side}{layer}.layer_norms.{norms[side].index(norm)}.{kind}"] = tensor
        elif not re.search(r"_proj\.|\._float_tensor", name) or "out_proj" in name:
            old[name] = tensor
    return old | {f"{side}.embed_positions.weights": torch.ones(3, 4) for side in norms}


def test_fairseq_names_of_the_first_versions(tmp_path):
    theirs = Fairseq()
    state = theirs.state()
    old = as_first_versions(state)
    assert "decoder.layers.0.encoder_attn.in_proj_weight" in old and "decoder.layers.2.layer_norms.2.bias" in old
    ours = of_file(tmp_path / "model.pt", {"args": theirs.options(), "model": old})
    assert_near(logits_of(ours, LEFT, TARGET), theirs.logits(state, LEFT, TARGET)[TARGET != PAD], 1e-5)


def fairseq_bart(theirs: transformers.PreTrainedModel, arch: str) -> dict:
    """Hugging Face's BART or mBART, in Fairseq's layout."""
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    for name in ("shared.weight", "final_logits_bias", "lm_head.weight"):
        state.pop(name, None)
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    pre = arch.startswith("mbart")
    options = argparse.Namespace(
        arch=arch, encoder_attention_heads=4, decoder_attention_heads=theirs.config.decoder_attention_heads,
        activation_fn="gelu", dropout=0.1,
        layernorm_embedding=True, no_scale_embedding=not theirs.config.scale_embedding,
        encoder_normalize_before=pre, decoder_normalize_before=pre, encoder_learned_pos=True, decoder_learned_pos=True,
    )  # fmt: skip
    return {"args": options, "model": state}


@pytest.mark.parametrize("name, arch", [("Bart", "bart_base"), ("MBart", "mbart_large")])
@pytest.mark.parametrize("age", ["new", "old"])
def test_fairseq_bart_is_hugging_faces(name, arch, age, tmp_path):
    """Of mBART with other heads and another feed-forward in the decoder."""
    unequal = {"scale_embedding": True, "decoder_attention_heads": 2, "decoder_ffn_dim": 40} if name == "MBart" else {}
    theirs = hf_model(f"{name}ForConditionalGeneration", pad_token_id=1, bos_token_id=0, **unequal)
    content = fairseq_bart(theirs, arch)
    if age == "old":
        content["model"] = as_first_versions(content["model"])
    ours = of_file(tmp_path / "model.pt", content)
    ids, target = random_ids(2, 7), random_ids(2, 5, seed=1)
    assert_near(ours(ids, decoder_input_ids=target).logits, theirs(ids, decoder_input_ids=target).logits, 1e-5)
    ours.save_pretrained(tmp_path / "theirs")
    again, report = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_fairseq_bart_that_classifies(tmp_path):
    theirs = hf_model("BartForSequenceClassification", pad_token_id=1, bos_token_id=0, num_labels=3)
    content = fairseq_bart(theirs, "bart_base")
    for name in list(content["model"]):
        if name.startswith("classification_head."):
            content["model"][name.replace("_head.", "_heads.mnli.")] = content["model"].pop(name)
    torch.save(content, tmp_path / "model.pt")
    assert Transformer.from_pretrained(tmp_path / "model.pt").config.objectives == ("seq2seq", "classification")
    ours = Transformer.from_pretrained(tmp_path / "model.pt", objectives=["classification"])
    ids = random_ids(2, 7)
    ids[:, -1] = 2  # theirs reads the state of the last </s>
    assert_near(ours(ids).logits, theirs(ids).logits, 1e-5)
    content["model"] |= {
        f"classification_heads.other.{part}.weight": torch.ones(3, 32) for part in ("dense", "out_proj")
    }
    with pytest.raises(ValueError, match="classification heads mnli, other; llmengine reads one"):
        of_file(tmp_path / "model.pt", content)


ROBERTA = (
    (r"^roberta\.embeddings\.word_embeddings\.", "encoder.sentence_encoder.embed_tokens."),
    (r"^roberta\.embeddings\.position_embeddings\.", "encoder.sentence_encoder.embed_positions."),
    (r"^roberta\.embeddings\.LayerNorm\.", "encoder.sentence_encoder.NORM."),
    (r"^roberta\.encoder\.layer\.", "encoder.sentence_encoder.layers."),
    (r"attention\.self\.(.)\w+\.", r"self_attn.\1_proj."),
    (r"attention\.output\.dense", "self_attn.out_proj"),
    (r"attention\.output\.LayerNorm", "self_attn_layer_norm"),
    (r"intermediate\.dense", "fc1"),
    (r"output\.LayerNorm", "final_layer_norm"),
    (r"output\.dense", "fc2"),
    (r"^lm_head\.decoder\.weight", "lm_head.weight"),
    (r"^lm_head\.", "encoder.lm_head."),
    (r"^classifier\.", "classification_heads.mnli."),
)


def fairseq_roberta(theirs: transformers.PreTrainedModel, embedding_norm: str, root: str) -> dict:
    state = {}
    for name, tensor in theirs.state_dict().items():
        if "token_type" in name or name == "lm_head.decoder.bias" or "position_ids" in name:
            continue
        for pattern, replacement in ROBERTA:
            name = re.sub(pattern, replacement, name)
        state[re.sub("^encoder", root, name).replace("NORM", embedding_norm)] = tensor
    return {"args": argparse.Namespace(arch="roberta_base", encoder_attention_heads=4, dropout=0.1), "model": state}


@pytest.mark.parametrize("names", [("emb_layer_norm", "decoder"), ("layernorm_embedding", "encoder")])
@pytest.mark.parametrize("task", ["MaskedLM", "SequenceClassification"])
def test_fairseq_roberta_is_hugging_faces(task, names, tmp_path):
    labels = {"num_labels": 3} if task == "SequenceClassification" else {}
    theirs = hf_model(f"RobertaFor{task}", type_vocab_size=1, max_position_embeddings=26, layer_norm_eps=1e-5, **labels)
    with torch.no_grad():
        theirs.roberta.embeddings.token_type_embeddings.weight.zero_()
    ours = of_file(tmp_path / "model.pt", fairseq_roberta(theirs, *names))
    assert ours.config.max_positions == 24 and ours.config.objectives == (("classification",) if labels else ("mlm",))
    for ids in (RIGHT,) if labels else (LEFT, RIGHT):  # a classifier of theirs reads the first column
        mask = (ids != PAD).long()
        expected = theirs(ids, mask).logits
        seen = slice(None) if labels else mask.bool()
        assert_near(ours(ids, mask).logits[seen], expected[seen], 1e-5)
    ours.save_pretrained(tmp_path / "theirs")
    again = getattr(transformers, f"RobertaFor{task}").from_pretrained(tmp_path / "theirs").eval()
    assert_near(again(RIGHT).logits, theirs(RIGHT).logits, 1e-6)


# ---- OpenNMT-py ------------------------------------------------------------------------------------------------------

OPENNMT = {
    "version 2": OpenNMT(),
    "tied": OpenNMT(tied=True, activation="gelu"),
    "no attention bias": OpenNMT(attention_bias=False, layers=(2, 2)),
    "two vocabularies": OpenNMT(apart=True),
    "two vocabularies, tied": OpenNMT(apart=True, tied=True),
}


def opennmt(theirs: OpenNMT, sequential: bool = False) -> dict:
    """sequential: the generator as version 2 has it."""
    state, generator = theirs.state()
    if sequential:
        generator = {f"0.{kind}": tensor for kind, tensor in generator.items()}
    source = [*VOCABULARY, *(f"s{i}" for i in range(SOURCE_WORDS - WORDS))] if theirs.apart else VOCABULARY
    vocabulary = {"src": source, "tgt": VOCABULARY, "data_task": "seq2seq", "decoder_start_token": "<s>"}
    return {"model": state, "generator": generator, "opt": theirs.options(), "vocab": vocabulary, "optim": {}}


@pytest.mark.parametrize("name", OPENNMT)
def test_opennmt_translation(name, tmp_path):
    theirs = OPENNMT[name]
    ours = of_file(tmp_path / "step_100.pt", opennmt(theirs, sequential=name == "version 2"))
    expected = theirs.logits(*theirs.state(), RIGHT, TARGET)
    assert_near(logits_of(ours, RIGHT, TARGET), expected[TARGET != PAD], 1e-5)
    config = ours.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 3)
    assert config.decoder_start_token_id == 2 and config.tie_embeddings == theirs.tied
    assert config.freeze_padding_row
    check_words(ours, theirs.apart)
    assert config.qkv_bias == theirs.attention_bias and config.dropout == 0.1 and config.attention_dropout == 0.0
    ours.save_pretrained(tmp_path / "ours")
    again = Transformer.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again, RIGHT, TARGET), logits_of(ours, RIGHT, TARGET))


def test_the_sources_padding_may_be_another_token(tmp_path):
    """Then it is no row that both embeddings freeze."""
    content = opennmt(OpenNMT(apart=True))
    source = content["vocab"]["src"]
    source[1], source[5] = source[5], source[1]
    config = of_file(tmp_path / "step_100.pt", content).config
    assert config.pad_token_id == 1 and not config.freeze_padding_row


def test_fairseqs_two_dictionaries_are_hugging_faces_fsmt(tmp_path):
    """FSMT is Fairseq's TransformerModel in Hugging Face's library."""
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=SOURCE_WORDS, tgt_vocab_size=WORDS, d_model=WIDTH, encoder_layers=2,
        decoder_layers=3, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, max_position_embeddings=30, activation_function="relu", pad_token_id=PAD,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.FSMTForConditionalGeneration(config).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if "embed_positions" not in name}
    options = Fairseq(apart=True, tied=False, scaled=config.scale_embedding).options()
    ours = of_file(tmp_path / "model.pt", {"args": options, "model": state})
    target = torch.tensor([[2, 7, 11, 3, 20], [2, 6, 10, 8, 30]])
    for source in (LEFT, RIGHT):
        mask = (source != PAD).long()
        expected = theirs(source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
        assert_near(ours(source, mask, decoder_input_ids=target).logits, expected, 1e-5)


def test_a_translator_that_was_read_translates(tmp_path):
    """Greedily, as the formulas' own loop does."""
    theirs = OpenNMT()
    ours = of_file(tmp_path / "step_100.pt", opennmt(theirs))
    state, generator = theirs.state()
    target = torch.full((2, 1), 2)
    for _ in range(6):
        best = theirs.logits(state, generator, RIGHT, target)[:, -1].argmax(-1, keepdim=True)
        target = torch.cat([target, best], 1)
    translated = ours.generate(RIGHT, attention_mask=(RIGHT != PAD).long(), max_new_tokens=6, eos_token_id=WORDS - 1)
    assert torch.equal(translated[:, : target.shape[1]], target)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_code_of_a_file_runs(tmp_path):
    torch.save({"args": Intruder(tmp_path / "intruded"), "model": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds a (posix|nt)\.system, which would run code"):
        Transformer.from_pretrained(tmp_path / "model.pt")
    assert not (tmp_path / "intruded").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the trap was a real one
    assert (tmp_path / "intruded").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04truncated", b"\x80\x02}q\x00."])
def test_other_files(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt (is neither|is no checkpoint of)"):
        Transformer.from_pretrained(tmp_path / "x.pt")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(ModuleNotFoundError, match=r"x\.gguf is a GGUF file; to read it: pip install gguf"):
        Transformer.from_pretrained(tmp_path / "x.gguf")


def with_options(content: dict, key: str, **options) -> dict:
    return content | {key: argparse.Namespace(**vars(content[key]) | options)}


def fairseq(**options) -> dict:
    model = Fairseq(layers=(1, 1))
    return with_options({"args": model.options(), "model": model.state()}, "args", **options)


def with_tensors(content: dict, change) -> dict:
    change(content["model"])
    return content


REFUSED = {
    "adaptive softmax": (lambda: fairseq(adaptive_softmax_cutoff="10,20"), "adaptive_softmax_cutoff is '10,20'"),
    "other activation": (lambda: fairseq(activation_fn="linear"), "activation_fn is 'linear'; llmengine computes relu"),
    "one side pre-LN": (lambda: fairseq(encoder_normalize_before=True), "normalize_before is True in the encoder"),
    "no options": (lambda: {"args": None, "cfg": None, "model": {}}, "without the options of its model"),
    "other model": (lambda: {"args": argparse.Namespace(arch="fconv"), "model": {}}, "of 'fconv'; llmengine reads"),
    "unknown tensor": (
        lambda: with_tensors(fairseq(), lambda t: t.update({"encoder.layers.0.w_resid": torch.ones(2)})),
        r"unknown to llmengine: model\.encoder\.layers\.0\.w_resid",
    ),
    "missing tensor": (
        lambda: with_tensors(fairseq(), lambda t: t.pop("encoder.layers.0.fc2.bias")),
        r"lacks model\.encoder\.layers\.0\.fc2\.bias",
    ),
    "recurrent": (lambda: with_options(opennmt(OpenNMT()), "opt", encoder_type="brnn"), "encoder_type is 'brnn'"),
    "rotary": (
        lambda: with_options(opennmt(OpenNMT()), "opt", max_relative_positions=-1),
        "max_relative_positions is -1; llmengine computes only 0",
    ),
    "copying": (lambda: with_options(opennmt(OpenNMT()), "opt", copy_attn=True), "copy_attn is True"),
    "word features": (
        lambda: with_tensors(
            opennmt(OpenNMT()),
            lambda t: t.update({"encoder.embeddings.make_embedding.emb_luts.1.weight": torch.ones(3, 3)}),
        ),
        r"unknown to llmengine: .*emb_luts\.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    make, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        of_file(tmp_path / "model.pt", make())
