"""BART (Lewis et al. 2019), mBART (Liu et al. 2020), Marian (Junczys-Dowmunt et al. 2018): Hugging Face's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmengine.convert.family import Family, Rule, copy, leaf, stacked, unless_equal


def _stack(side: str, mark: str) -> tuple[Rule, ...]:
    ours, theirs = f"{side}.layers.{mark}.", f"model.{side}.layers.{mark}."
    rules = (
        copy(f"{side}.embeddings.position.weight", f"model.{side}.embed_positions.weight"),
        *leaf(f"{side}.embeddings.norm", f"model.{side}.layernorm_embedding"),
        *stacked(f"{ours}attention.qkv", *(f"{theirs}self_attn.{part}_proj" for part in "qkv")),
        *leaf(f"{ours}attention.out", f"{theirs}self_attn.out_proj"),
        *leaf(f"{ours}attention_norm", f"{theirs}self_attn_layer_norm"),
        *leaf(f"{ours}feed_forward.up", f"{theirs}fc1"),
        *leaf(f"{ours}feed_forward.down", f"{theirs}fc2"),
        *leaf(f"{ours}feed_forward_norm", f"{theirs}final_layer_norm"),
        *leaf(f"{side}.final_norm", f"model.{side}.layer_norm"),
    )
    if side == "encoder":
        return rules
    return (
        *rules,
        *leaf(f"{ours}cross_attention.q", f"{theirs}encoder_attn.q_proj"),
        *stacked(f"{ours}cross_attention.kv", *(f"{theirs}encoder_attn.{part}_proj" for part in "kv")),
        *leaf(f"{ours}cross_attention.out", f"{theirs}encoder_attn.out_proj"),
        *leaf(f"{ours}cross_attention_norm", f"{theirs}encoder_attn_layer_norm"),
    )


def _words(ours: Mapping[str, Any]) -> tuple[Rule, ...]:
    """One embedding, or one of each side."""
    if ours["share_embeddings"]:
        return (copy("encoder.embeddings.word.weight", "model.shared.weight"),)
    return tuple(
        copy(f"{side}.embeddings.word.weight", f"model.{side}.embed_tokens.weight") for side in ("encoder", "decoder")
    )


def _logits_bias() -> Rule:
    """A buffer of theirs, which most models leave at zero; Marian's are trained."""

    def read(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [tensors[0].flatten()]

    def write(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [tensors[0][None]]

    return Rule(("token_head.bias",), ("final_logits_bias",), read, write)


def _translate(theirs: Mapping[str, Any]) -> dict[str, Any]:
    first, second = theirs["encoder_layerdrop"], theirs["decoder_layerdrop"]
    if first != second:
        raise ValueError(
            f"config.json: encoder_layerdrop is {first} and decoder_layerdrop {second}; llmengine has one layer_dropout"
        )
    return {
        "n_decoder_layers": unless_equal(theirs["decoder_layers"], theirs["encoder_layers"]),
        "n_decoder_heads": unless_equal(theirs["decoder_attention_heads"], theirs["encoder_attention_heads"]),
        "d_decoder_ff": unless_equal(theirs["decoder_ffn_dim"], theirs["encoder_ffn_dim"]),
    }


def _write_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "is_encoder_decoder": True,
        "decoder_layers": ours["n_decoder_layers"] or ours["n_layers"],
        "decoder_attention_heads": ours["n_decoder_heads"] or ours["n_heads"],
        "decoder_ffn_dim": ours["d_decoder_ff"] or ours["d_ff"],
        "decoder_layerdrop": ours["layer_dropout"],
        "num_hidden_layers": ours["n_layers"],
    }


BART = Family(
    name="bart",
    prefix="model.",
    heads=("lm_head.", "final_logits_bias", "classification_head.", "qa_outputs."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("d_model", "d_model"),
        ("encoder_layers", "n_layers"),
        ("encoder_attention_heads", "n_heads"),
        ("encoder_ffn_dim", "d_ff"),
        ("max_position_embeddings", "max_positions"),
        ("activation_function", "activation"),
        ("scale_embedding", "embed_scale"),
        ("dropout", "dropout"),
        ("dropout", "embed_dropout"),
        ("attention_dropout", "attention_dropout"),
        ("activation_dropout", "activation_dropout"),
        ("encoder_layerdrop", "layer_dropout"),
        ("init_std", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("decoder_start_token_id", "decoder_start_token_id"),
    ),
    constants={
        "architecture": "encoder_decoder",
        "position_offset": 2,
        "norm_place": "post",
        "embed_norm": True,
        "final_norm": False,
        "head_bias": True,
        "freeze_padding_row": True,
    },
    defaults={
        "vocab_size": 50265,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "scale_embedding": False,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "num_labels": 3,
    },
    demanded={
        "is_encoder_decoder": (True,),
        "normalize_before": (False,),
        "add_final_layer_norm": (False,),
        "normalize_embedding": (True,),
        "static_position_embeddings": (False,),
        "extra_pos_embeddings": (2,),
        "add_bias_logits": (False,),
        "is_decoder": (False,),
        "add_cross_attention": (False, True),  # always is
        "do_blenderbot_90_layernorm": (False,),
    },
    without_effect=frozenset(
        "num_hidden_layers classif_dropout num_labels save_step replacing_rate student_decoder_layers "
        "student_encoder_layers".split()
    ),
    translated=frozenset("decoder_layers decoder_attention_heads decoder_ffn_dim decoder_layerdrop".split()),
    translate=_translate,
    write_back=_write_back,
    classes={
        "BartForConditionalGeneration": ("seq2seq",),
        "BartModel": (),
        "BartForSequenceClassification": ("classification",),
        "BartForQuestionAnswering": ("qa",),
    },
    class_fields={"BartForSequenceClassification": {"classifier": "dense_tanh", "summary": "last"}},
    evidence={"seq2seq": "final_logits_bias"},
    tensors=(
        *_stack("encoder", "{i}"),
        *_stack("decoder", "{j}"),
        copy("token_head.weight", "lm_head.weight"),
        _logits_bias(),
    ),
    variants=_words,
    heads_of={
        "classification": (
            *leaf("heads.classification.dense", "classification_head.dense"),
            *leaf("heads.classification.out", "classification_head.out_proj"),
        ),
        "qa": leaf("heads.qa", "qa_outputs"),
    },
    tied={
        "lm_head.weight": "model.shared.weight",
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    tied_apart={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    # nothing but tie_word_embeddings ties them; `shared` has then no use
    apart={"share_embeddings": ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")},
    skipped=r"(en|de)coder\.version$|^model\.shared\.weight$",
)
MBART = replace(
    BART,
    name="mbart",
    constants={**BART.constants, "norm_place": "pre", "final_norm": True},
    defaults=BART.defaults | {"decoder_start_token_id": None, "num_labels": 2},
    demanded={
        **BART.demanded,
        "normalize_before": (True, False),
        "add_final_layer_norm": (True, False),
    },
    classes={name.replace("Bart", "MBart"): heads for name, heads in BART.classes.items()},
    class_fields={name.replace("Bart", "MBart"): fields for name, fields in BART.class_fields.items()},
)


def _marian(theirs: Mapping[str, Any]) -> dict[str, Any]:
    source, target = theirs["vocab_size"], theirs.get("decoder_vocab_size")
    target = source if target is None else target
    shared = theirs["share_encoder_decoder_embeddings"]
    if shared and target != source:
        raise ValueError(
            "config.json of family marian: decoder_vocab_size differs from vocab_size, but both share words"
        )
    apart = {"share_embeddings": shared, "vocab_size": target, "encoder_vocab_size": unless_equal(source, target)}
    return _translate(theirs) | apart


def _marian_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    return _write_back(ours) | {
        "vocab_size": ours["encoder_vocab_size"],
        "decoder_vocab_size": ours["vocab_size"],
        "share_encoder_decoder_embeddings": ours["share_embeddings"],
    }


MARIAN = replace(
    BART,
    name="marian",
    constants={
        **BART.constants,
        "positions": "sinusoid_halves",
        "position_offset": 0,
        "embed_norm": False,
    },
    defaults=BART.defaults
    | {
        "vocab_size": 58101,
        "decoder_start_token_id": 58100,
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "bos_token_id": None,
        "num_labels": 2,
        "share_encoder_decoder_embeddings": True,
    },
    demanded={
        **{name: allowed for name, allowed in BART.demanded.items() if name != "extra_pos_embeddings"},
        "normalize_embedding": (True, False),
        "static_position_embeddings": (True, False),
    },
    # their positions are no table, so that it has no rows to spare: files say any number, mostly that of words
    without_effect=BART.without_effect | {"extra_pos_embeddings"},
    translated=BART.translated | {"decoder_vocab_size", "share_encoder_decoder_embeddings"},
    translate=_marian,
    write_back=_marian_back,
    classes={"MarianMTModel": ("seq2seq",), "MarianModel": ()},
    class_fields={},
    heads_of={},
    skipped=rf"embed_positions\.weight$|{BART.skipped}",  # sines and cosines
)
