"""OpenNMT-py's checkpoints (Klein et al. 2017): the Transformer for translation.

Its layers are pre-LN, its positions sines and cosines in turns. Renamed, its tensors are read by the table of Hugging
Face's BART.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmengine.convert.bart import BART
from llmengine.convert.family import unless_equal
from llmengine.convert.foreign import Foreign, demand, depth, renamed, words_of

ROLES = {"pad_token_id": "<blank>", "bos_token_id": "<s>", "eos_token_id": "</s>"}
POSITIONS = 5000  # rows of its table
DEMANDED: dict[str, tuple] = {
    "model_task": ("seq2seq",),
    "encoder_type": ("transformer",),
    "decoder_type": ("transformer",),
    "position_encoding": (True,),
    "position_encoding_type": ("SinusoidalInterleaved", None),
    "max_relative_positions": (0,),
    "self_attn_type": ("scaled-dot", "scaled-dot-flash"),
    "pos_ffn_activation_fn": ("relu", "gelu"),
    "layer_norm": ("standard",),
    "parallel_residual": (False,),
    "num_kv": (0,),
    "sliding_window": (0,),
    "num_experts": (0,),
    "copy_attn": (False,),
}
_NO_PARAMETER = r"\.pe$|\.mask$"
_NAMES = (
    (r"^(encoder|decoder)\.embeddings\.make_embedding\.emb_luts\.0\.weight$", r"model.\1.embed_tokens.weight"),
    (r"^encoder\.transformer\.", "model.encoder.layers."),
    (r"^decoder\.transformer_layers\.", "model.decoder.layers."),
    (r"^(encoder|decoder)\.layer_norm\.", r"model.\1.layer_norm."),
    (r"\.feed_forward\.layer_norm\.", ".final_layer_norm."),
    (r"\.feed_forward\.w_([12])\.", r".fc\1."),
    (r"(\.layers\.\d+)\.layer_norm(_1)?\.", r"\1.self_attn_layer_norm."),
    (r"\.layer_norm_2\.", ".encoder_attn_layer_norm."),
    (r"\.context_attn\.", ".encoder_attn."),
    (r"\.linear_query\.", ".q_proj."),
    (r"\.linear_keys\.", ".k_proj."),
    (r"\.linear_values\.", ".v_proj."),
    (r"\.final_linear\.", ".out_proj."),
    (r"_norm\.a_2$", "_norm.weight"),  # of the first versions
    (r"_norm\.b_2$", "_norm.bias"),
)
_GENERATOR = ((r"^(0\.)?weight$", "lm_head.weight"), (r"^(0\.)?bias$", "final_logits_bias"))


def recognises(content: Any) -> bool:
    return isinstance(content, dict) and {"model", "generator", "opt"} <= content.keys()


def read(content: Mapping[str, Any]) -> Foreign:
    """ValueError where the model is no Transformer, or has options that llmengine does not compute."""
    options = vars(content["opt"]) if isinstance(content["opt"], argparse.Namespace) else dict(content["opt"])
    demand("OpenNMT-py", options, DEMANDED)
    tensors = renamed(content["model"], _NAMES, _NO_PARAMETER) | renamed(content["generator"], _GENERATOR, "$^")
    fields = fields_of(
        "OpenNMT-py",
        tensors,
        n_heads=options.get("heads", 8),
        activation=options.get("pos_ffn_activation_fn", "relu"),
        positions="sinusoid",
        max_positions=POSITIONS,
        embed_scale=True,
        norm_eps=float(options.get("norm_eps", 1e-6)),
    )
    return Foreign(BART, fields | _dropouts(options) | token_fields(content.get("vocab"), ROLES), tensors)


def fields_of(toolkit: str, tensors: dict[str, Tensor], **given: Any) -> dict[str, Any]:
    """Of a pre-LN Transformer whose tensors have the names of Hugging Face's BART: `given`, and what they tell."""
    for needed in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        if needed not in tensors:
            raise ValueError(f"{toolkit} checkpoint: it lacks {needed}, by the name that llmengine gives it")
    if "final_logits_bias" in tensors:
        tensors["final_logits_bias"] = tensors["final_logits_bias"][None]
    layers, decoder_layers = (depth(tensors, f"model.{side}.layers") for side in ("encoder", "decoder"))
    width, decoder_width = (len(tensors[f"model.{side}.layers.0.fc1.weight"]) for side in ("encoder", "decoder"))
    first = "model.encoder.layers.0."
    return {
        "family": "custom",
        "architecture": "encoder_decoder",
        "objectives": ["seq2seq"],
        **words_of(tensors),
        "n_layers": layers,
        "n_decoder_layers": unless_equal(decoder_layers, layers),
        "d_ff": width,
        "d_decoder_ff": unless_equal(decoder_width, width),
        "norm_place": "pre",
        "final_norm": True,
        "qkv_bias": f"{first}self_attn.q_proj.bias" in tensors,
        "attention_bias": f"{first}self_attn.out_proj.bias" in tensors,
        "feed_forward_bias": f"{first}fc1.bias" in tensors,
        "head_bias": "final_logits_bias" in tensors,
        **given,
    }


def last_of(options: Mapping[str, Any], name: str, default: float) -> float:
    """Lists hold what was in force after so many steps; a model goes on with the last."""
    value = options.get(name, default)
    return float(value[-1] if isinstance(value, list) else value)


def _dropouts(options: Mapping[str, Any]) -> dict[str, float]:
    dropout = last_of(options, "dropout", 0.1)
    attention = last_of(options, "attention_dropout", 0.1)
    return {
        "dropout": dropout, "embed_dropout": dropout, "activation_dropout": dropout, "attention_dropout": attention,
    }  # fmt: skip


def token_fields(vocabulary: Any, roles: Mapping[str, str]) -> dict[str, Any]:
    """Ids of the special tokens, where there is a list of the target's words; `roles`: their texts. The source's
    padding is another token where the lists differ in it; its embedding is then no frozen row."""
    words = vocabulary.get("tgt") if isinstance(vocabulary, dict) else None
    if not isinstance(words, list):
        return {}
    source = vocabulary.get("src") or words
    ids = {field: words.index(token) for field, token in roles.items() if token in words}
    start = vocabulary.get("decoder_start_token", roles["bos_token_id"])
    return {
        **ids,
        "decoder_start_token_id": words.index(start) if start in words else None,
        "freeze_padding_row": "pad_token_id" in ids and source[ids["pad_token_id"] :][:1] == [roles["pad_token_id"]],
    }
