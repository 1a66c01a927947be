"""Fairseq's checkpoints (Ott et al. 2019): TransformerModel for translation, BART, mBART and RoBERTa.

Fairseq's tensors have the names that Hugging Face's BART took over, so that table reads them. A file says little of its
model: shapes and presence tell most of it, the options of the training run the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmengine.convert.bart import BART, MBART
from llmengine.convert.bert import ROBERTA
from llmengine.convert.family import unless_equal
from llmengine.convert.foreign import Foreign, demand, depth, of_both, renamed, words_of

# Every dictionary of Fairseq's begins with <s>, <pad>, </s>, <unk>; decoders start with </s>.
TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
FIRST_POSITION = TOKENS["pad_token_id"] + 1  # a table's row for the first token: padding has the one before
ACTIVATIONS = {
    "relu": "relu", "relu_squared": "relu_squared", "gelu": "gelu", "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "swish": "silu",
}  # fmt: skip
DEMANDED: dict[str, tuple] = {
    "adaptive_input": (False, None),
    "adaptive_softmax_cutoff": (None,),
    "cross_self_attention": (False, None),
    "no_cross_attention": (False, None),
    "encoder_layers_to_keep": (None,),
    "decoder_layers_to_keep": (None,),
    "pooler_activation_fn": ("tanh",),
}
SIDES = ("encoder", "decoder")
_NO_PARAMETER = r"\.version$|\._float_tensor$|embed_positions\.weights$"
_HEAD = r"^classification_heads\.[^.]+\."
_TRANSFORMER = (
    (r"\.layer_norms\.0\.", ".self_attn_layer_norm."),
    (r"^(encoder\..*)\.layer_norms\.1\.", r"\1.final_layer_norm."),
    (r"^(decoder\..*)\.layer_norms\.1\.", r"\1.encoder_attn_layer_norm."),
    (r"\.layer_norms\.2\.", ".final_layer_norm."),
    (r"^decoder\.(output_projection\.weight|embed_out)$", "lm_head.weight"),
    (r"^(encoder|decoder)\.", r"model.\1."),
    (_HEAD, "classification_head."),
)
_ROBERTA = (
    (r"^(encoder|decoder)\.lm_head\.weight$", "lm_head.decoder.weight"),
    (r"^(encoder|decoder)\.lm_head\.", "lm_head."),
    (r"^(encoder|decoder)\.sentence_encoder\.embed_tokens\.", "roberta.embeddings.word_embeddings."),
    (r"^(encoder|decoder)\.sentence_encoder\.embed_positions\.", "roberta.embeddings.position_embeddings."),
    (r"^(encoder|decoder)\.sentence_encoder\.(emb_layer_norm|layernorm_embedding)\.", "roberta.embeddings.LayerNorm."),
    (r"^(encoder|decoder)\.sentence_encoder\.layers\.", "roberta.encoder.layer."),
    (r"\.self_attn\.q_proj\.", ".attention.self.query."),
    (r"\.self_attn\.k_proj\.", ".attention.self.key."),
    (r"\.self_attn\.v_proj\.", ".attention.self.value."),
    (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
    (r"\.self_attn_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"\.final_layer_norm\.", ".output.LayerNorm."),
    (_HEAD, "classifier."),
)


def recognises(content: Any) -> bool:
    return isinstance(content, dict) and "model" in content and ("args" in content or "cfg" in content)


def read(path: Path, content: Mapping[str, Any]) -> Foreign:
    """ValueError where the model is none of those above, or has options that llmengine does not compute."""
    options = _options(path, content)
    tensors = _divided(content["model"])
    demand("Fairseq", options, DEMANDED)
    heads = {name.split(".")[1] for name in tensors if name.startswith("classification_heads.")}
    if len(heads) > 1:
        raise ValueError(f"Fairseq checkpoint: classification heads {', '.join(sorted(heads))}; llmengine reads one")
    if any(".sentence_encoder." in name for name in tensors):
        return _roberta(options, renamed(tensors, _ROBERTA, _NO_PARAMETER))
    if {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= tensors.keys():
        return _transformer(options, renamed(tensors, _TRANSFORMER, _NO_PARAMETER))
    raise ValueError(
        f"{path}: a Fairseq checkpoint of {_name(options)!r}; llmengine reads TransformerModel, BART, mBART and RoBERTa"
    )


def _options(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Of the model: a Namespace, under "args" in older files; or sections of "cfg", {"encoder": {"layers": …}, …}."""
    config = content.get("args")
    if config is None:
        config = (content.get("cfg") or {}).get("model")
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a Fairseq checkpoint without the options of its model")
    options = {key: value for key, value in config.items() if not isinstance(value, dict)}
    for section, values in config.items():
        if isinstance(values, dict):
            options |= {f"{section}_{key}": value for key, value in values.items()}
    return options


def _name(options: Mapping[str, Any]) -> str | None:
    """Of the architecture, in files of either age."""
    return options.get("arch") or options.get("_name")


def _divided(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as three tensors, which older files have one above the other."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".in_proj_")
        if stem:
            result |= {f"{stem}.{part}_proj.{kind}": x for part, x in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            result[name] = tensor
    return result


def _training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that RoBERTa has as well as encoder-decoders."""
    activation = options.get("activation_fn", "relu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"Fairseq checkpoint: activation_fn is {activation!r}; llmengine computes {', '.join(ACTIVATIONS)}"
        )
    if "encoder_attention_heads" not in options:
        raise ValueError("Fairseq checkpoint: its options lack encoder_attention_heads")
    dropout = float(options.get("dropout", 0.1))
    return TOKENS | {
        "activation": ACTIVATIONS[activation],
        "n_heads": options["encoder_attention_heads"],
        "dropout": dropout,
        "embed_dropout": dropout,
        "attention_dropout": float(options.get("attention_dropout", 0.0)),
        "activation_dropout": float(options.get("activation_dropout") or options.get("relu_dropout") or 0.0),
        "layer_dropout": float(options.get("encoder_layerdrop") or 0.0),
        "freeze_padding_row": True,
    }


def _classifier(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The number of labels, where there is such a head."""
    out = tensors.get(f"{name}.out_proj.weight")
    return {} if out is None else {"n_labels": len(out), "classifier": "dense_tanh"}


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


def _transformer(options: Mapping[str, Any], tensors: dict[str, Tensor]) -> Foreign:
    def both(what: str, encoder: Any, decoder: Any) -> Any:
        return of_both("Fairseq", what, encoder, decoder)

    def has(leaf: str) -> bool:
        return both(f"whether it has {leaf}", *(f"model.{side}.{leaf}.weight" in tensors for side in SIDES))

    words = words_of(tensors)
    layers, decoder_layers = (depth(tensors, f"model.{side}.layers") for side in SIDES)
    widths = [len(tensors[f"model.{side}.layers.0.fc1.weight"]) for side in SIDES]
    training = _training(options)
    heads = training["n_heads"]
    pre = both("normalize_before", *(bool(options.get(f"{side}_normalize_before")) for side in SIDES))
    labels = _classifier(tensors, "classification_head")
    fields = {
        **training,
        "family": "custom",
        "architecture": "encoder_decoder",
        "objectives": ["seq2seq", "classification"] if labels else ["seq2seq"],
        **labels,
        "summary": "last" if labels else "first",
        **words,
        "n_layers": layers,
        "n_decoder_layers": unless_equal(decoder_layers, layers),
        "n_decoder_heads": unless_equal(options.get("decoder_attention_heads", heads), heads),
        "d_ff": widths[0],
        "d_decoder_ff": unless_equal(widths[1], widths[0]),
        "norm_place": "pre" if pre else "post",
        "final_norm": has("layer_norm"),
        "embed_norm": has("layernorm_embedding"),
        "embed_scale": not options.get("no_scale_embedding", False),
        "decoder_start_token_id": TOKENS["eos_token_id"],
        "position_of": "token",
        **_positions(options, tensors, learned=has("embed_positions")),
    }
    family = BART
    shared = words.get("share_embeddings", True)
    if shared and str(_name(options)).startswith(("bart", "mbart")) and fields["embed_norm"] and has("embed_positions"):
        # as Hugging Face has them: padding on the right, and a bias on the logits that begins at zero
        family = MBART if pre else BART
        fields |= {"family": family.name, "position_of": "column", "head_bias": True}
        fields["decoder_start_token_id"] = None if pre else TOKENS["eos_token_id"]
        tensors["final_logits_bias"] = tensors["model.shared.weight"].new_zeros(1, words["vocab_size"])
    return Foreign(family, fields, tensors)


def _positions(options: Mapping[str, Any], tensors: Mapping[str, Tensor], *, learned: bool) -> dict[str, Any]:
    if learned:
        rows = of_both("Fairseq", "positions", *(len(tensors[f"model.{s}.embed_positions.weight"]) for s in SIDES))
        return {"positions": "learned", "max_positions": rows - FIRST_POSITION, "position_offset": FIRST_POSITION}
    longest = max(int(options.get(f"max_{side}_positions") or 1024) for side in ("source", "target"))
    if options.get("no_token_positional_embeddings"):
        return {"positions": "none", "max_positions": longest}
    return {"positions": "sinusoid_fairseq", "max_positions": longest, "position_offset": FIRST_POSITION}


# ---- RoBERTa ---------------------------------------------------------------------------------------------------------


def _roberta(options: Mapping[str, Any], tensors: dict[str, Tensor]) -> Foreign:
    words = tensors["roberta.embeddings.word_embeddings.weight"]
    # Hugging Face's RoBERTa has one token type, Fairseq's none
    tensors["roberta.embeddings.token_type_embeddings.weight"] = words.new_zeros(1, words.shape[1])
    head = tensors.get("lm_head.decoder.weight")
    labels = _classifier(tensors, "classifier")
    fields = {
        **ROBERTA.constants,
        **_training({"activation_fn": "gelu", **options}),
        "family": ROBERTA.name,
        "objectives": [
            *(["mlm"] if "lm_head.dense.weight" in tensors else []),
            *(["classification"] if labels else []),
        ],
        **labels,
        "vocab_size": words.shape[0],
        "d_model": words.shape[1],
        "n_layers": depth(tensors, "roberta.encoder.layer"),
        "d_ff": len(tensors["roberta.encoder.layer.0.intermediate.dense.weight"]),
        "type_vocab_size": 1,
        "norm_eps": 1e-5,
        "position_offset": FIRST_POSITION,
        "max_positions": len(tensors["roberta.embeddings.position_embeddings.weight"]) - FIRST_POSITION,
        "tie_embeddings": head is None or torch.equal(head, words),
    }
    return Foreign(ROBERTA, fields, tensors)
