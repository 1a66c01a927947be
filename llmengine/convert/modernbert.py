"""ModernBERT (Warner et al. 2024) as Hugging Face stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmengine.convert import rotary
from llmengine.convert.family import Family, divide, leaf

_OURS, _LAYER = "encoder.layers.{i}.", "model.layers.{i}."


def _translate(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if not theirs.get("layer_types"):  # as older files say it
        every = theirs.get("global_attn_every_n_layers", 3)
        kinds = ["sliding_attention" if i % every else "full_attention" for i in range(theirs["num_hidden_layers"])]
        theirs = {**theirs, "layer_types": kinds}
    types = rotary.layer_types(theirs)
    return {
        "window": theirs["local_attention"] // 2,
        "layer_types": types,
        "rotary": rotary.read(theirs, theta=160_000.0, window_theta=10_000.0),
        "summary": {"cls": "first", "mean": "mean"}[theirs["classifier_pooling"]],
    }


def _write_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **rotary.write(ours["rotary"]),
        "local_attention": 2 * ours["window"],
        "layer_types": rotary.write_layer_types(ours),
        "classifier_pooling": {"first": "cls", "mean": "mean"}[ours["summary"]],
        "cls_token_id": ours["bos_token_id"],
        "sep_token_id": ours["eos_token_id"],
    }


def _head(objective: str) -> tuple:
    return (
        *leaf(f"heads.{objective}.dense", "head.dense"),
        *leaf(f"heads.{objective}.norm", "head.norm"),
        *leaf(f"heads.{objective}.out", "classifier"),
    )


MODERNBERT = Family(
    name="modernbert",
    prefix="model.",
    heads=("head.", "decoder.", "classifier."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "d_model"),
        ("num_hidden_layers", "n_layers"),
        ("num_attention_heads", "n_heads"),
        ("intermediate_size", "d_ff"),
        ("max_position_embeddings", "max_positions"),
        ("hidden_activation", "activation"),
        ("norm_eps", "norm_eps"),
        ("norm_bias", "norm_bias"),
        ("attention_bias", "qkv_bias"),
        ("attention_bias", "attention_bias"),
        ("mlp_bias", "feed_forward_bias"),
        ("decoder_bias", "head_bias"),
        ("classifier_bias", "head_transform_bias"),
        ("embedding_dropout", "embed_dropout"),
        ("mlp_dropout", "activation_dropout"),
        ("initializer_range", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={
        "architecture": "encoder",
        "positions": "rotary",
        "embed_norm": True,
        "first_norm": False,
        "gated": True,
        "head_transform": True,
        "scale_residual_init": True,
        "freeze_padding_row": True,
        "classifier": "dense_norm",
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    defaults={
        "vocab_size": 50368,
        "hidden_size": 768,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "decoder_bias": True,
        "classifier_bias": False,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": 50283,
        "bos_token_id": 50281,
        "eos_token_id": 50282,
        "local_attention": 128,
        "classifier_pooling": "cls",
    },
    # its attention_dropout falls on attention's output too, in place of the residual dropout that it has not
    demanded={
        "is_decoder": (False,),
        "attention_dropout": (0.0,),
        "classifier_activation": ("gelu",),
        "hidden_activation": ("gelu",),
    },
    without_effect=frozenset(
        "initializer_cutoff_factor cls_token_id sep_token_id deterministic_flash_attn sparse_prediction "
        "sparse_pred_ignore_index reference_compile repad_logits_with_grad position_embedding_type "
        "layer_norm_eps".split()
    ),
    translated=rotary.FIELDS | {"local_attention", "layer_types", "classifier_pooling", "global_attn_every_n_layers"},
    translate=_translate,
    write_back=_write_back,
    classes={
        "ModernBertForMaskedLM": ("mlm",),
        "ModernBertModel": (),
        "ModernBertForSequenceClassification": ("classification",),
        "ModernBertForTokenClassification": ("tagging",),
    },
    evidence={"mlm": "head.dense.weight"},
    tensors=(
        *leaf("encoder.embeddings.word", "model.embeddings.tok_embeddings")[:1],
        *leaf("encoder.embeddings.norm", "model.embeddings.norm"),
        *leaf(f"{_OURS}attention_norm", f"{_LAYER}attn_norm"),
        *leaf(f"{_OURS}attention.qkv", f"{_LAYER}attn.Wqkv"),
        *leaf(f"{_OURS}attention.out", f"{_LAYER}attn.Wo"),
        *leaf(f"{_OURS}feed_forward_norm", f"{_LAYER}mlp_norm"),
        *(
            divide((f"{_OURS}feed_forward.gate.{kind}", f"{_OURS}feed_forward.up.{kind}"), f"{_LAYER}mlp.Wi.{kind}")
            for kind in ("weight", "bias")
        ),
        *leaf(f"{_OURS}feed_forward.down", f"{_LAYER}mlp.Wo"),
        *leaf("encoder.final_norm", "model.final_norm"),
        *leaf("token_head.dense", "head.dense"),
        *leaf("token_head.norm", "head.norm"),
        *leaf("token_head", "decoder"),
    ),
    heads_of={"classification": _head("classification"), "tagging": _head("tagging")},
    tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)
