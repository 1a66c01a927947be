"""Eole's model directories (OpenNMT-py's successor, from its version 0.1 on): the Transformer for translation.

config.json holds the options of the run, those of the model under "model": a side's own section comes before what is
said of both. vocab.json lists the words, model.NN.safetensors the tensors. The layers are pre-LN; renamed, their
tensors are read by the table of Hugging Face's BART.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmengine.convert import files
from llmengine.convert.bart import BART
from llmengine.convert.foreign import Foreign, demand, of_both, renamed
from llmengine.convert.opennmt import ROLES, fields_of, last_of, token_fields
from llmengine.files import read_json

VOCABULARY = "vocab.json"
ARCHITECTURES = ("transformer", "custom")
POSITIONS = {
    "SinusoidalInterleaved": {"positions": "sinusoid", "max_positions": 5000, "embed_scale": True},
    "SinusoidalConcat": {"positions": "sinusoid_fairseq", "max_positions": 5000, "embed_scale": True},
    "Learned": {"positions": "learned", "embed_scale": False},
}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu-tanh": "gelu_tanh", "silu": "silu"}
# The first value of each is the one of an option that is not given.
OF_MODEL: dict[str, tuple] = {
    "architecture": ARCHITECTURES,
    "generator_function": ("softmax",),
    "add_estimator": (False,),
}
OF_EMBEDDINGS: dict[str, tuple] = {
    "embedding_type": ("standard",),
    "position_encoding_type": tuple(POSITIONS),
    "position_shift": (0, None),
    "normalize": (False, None),
    "embedding_layer_norm": (False,),
}
OF_SIDE: dict[str, tuple] = {
    "encoder_type": ("transformer",),
    "decoder_type": ("transformer",),
    "encoder_layer_style": ("standard",),
    "final_encoder_layer_norm": (True,),
    "layer_norm": ("standard", "standardFP32"),
    "mlp_activation_fn": tuple(ACTIVATIONS),
    "ffn_layernorm": (False,),
    "parallel_residual": (False,),
    "query_norm": (False,),
    "key_norm": (False,),
    "value_norm": (False,),
    "q_gating": (False,),
    "attn_scaling": (None,),
    "relative_positions_buckets": (0,),
    "sliding_window": (0,),
    "num_experts": (0,),
    "coverage_attn": (False,),
    "layer_types": (None,),
    "num_mtp_heads": (0,),
    "LM_type": ("causal",),
}
_SCALAR = re.compile(r"^decoder\.transformer_layers\.\d+\.layer_scalar$")
_NO_PARAMETER = rf"\.pe\.pe$|{_SCALAR.pattern}"
_NAMES = (
    (r"^src_emb\.embeddings\.", "model.encoder.embed_tokens."),
    (r"^tgt_emb\.embeddings\.", "model.decoder.embed_tokens."),
    (r"^src_emb\.pe\.", "model.encoder.embed_positions."),
    (r"^tgt_emb\.pe\.", "model.decoder.embed_positions."),
    (r"^(encoder|decoder)\.transformer_layers\.", r"model.\1.layers."),
    (r"^(encoder|decoder)\.layer_norm\.", r"model.\1.layer_norm."),
    (r"\.input_layernorm\.", ".self_attn_layer_norm."),
    (r"\.precontext_layernorm\.", ".encoder_attn_layer_norm."),
    (r"\.post_attention_layernorm\.", ".final_layer_norm."),
    (r"\.mlp\.gate_up_proj\.", ".fc1."),
    (r"\.mlp\.down_proj\.", ".fc2."),
    (r"\.context_attn\.", ".encoder_attn."),
    (r"\.linear_query\.", ".q_proj."),
    (r"\.linear_keys\.", ".k_proj."),
    (r"\.linear_values\.", ".v_proj."),
    (r"\.final_linear\.", ".out_proj."),
    (r"^generator\.weight$", "lm_head.weight"),
    (r"^generator\.bias$", "final_logits_bias"),
)


def recognises(config: Mapping[str, Any]) -> bool:
    return "model_type" not in config and isinstance(config.get("model"), dict)


def read(directory: Path, config: Mapping[str, Any]) -> Foreign:
    """ValueError where the model is no Transformer of two sides, or has options that llmengine does not compute."""
    model = config["model"]
    demand("Eole", model, OF_MODEL)
    embeddings = _section(model, "embeddings")
    demand("Eole", embeddings, OF_EMBEDDINGS)
    encoder, decoder = (_section(model, side) for side in ("encoder", "decoder"))
    for side in (encoder, decoder):
        demand("Eole", side, OF_SIDE)
        _demand_whole_heads(side)

    def common(name: str, default: Any) -> Any:
        return of_both("Eole", name, encoder.get(name, default), decoder.get(name, default))

    theirs = _tensors(directory)
    tensors = _in_barts_names(theirs)
    fields = fields_of(
        "Eole",
        tensors,
        n_heads=common("heads", 8),
        activation=ACTIVATIONS[common("mlp_activation_fn", "relu")],
        norm_eps=_norm_eps(common("norm_eps", None), model.get("eole_version"), theirs),
        **_positions(embeddings, tensors),
    )
    return Foreign(BART, fields | _dropouts(config.get("training")) | _tokens(directory), tensors)


def _section(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    own = model.get(name)
    if own is not None and not isinstance(own, dict):
        raise ValueError(f'Eole checkpoint: "{name}" of config.json is {own!r}; a section of options is wanted')
    of_all = {key: value for key, value in model.items() if not isinstance(value, dict)}
    return of_all | (own or {})


def _demand_whole_heads(side: Mapping[str, Any]) -> None:
    """Keys have as many heads as queries, which share the width."""
    heads, width = side.get("heads", 8), side.get("hidden_size", 512)
    demand("Eole", side, {"heads_kv": (None, heads), "head_dim": (None, width // heads)})


def _norm_eps(said: float | None, version: Any, theirs: Iterable[str]) -> float:
    """Files tell only what was set: otherwise it is what the version that wrote them had, where that can be known."""
    if said is not None:
        return float(said)
    if version is not None:
        return 1e-6 if re.match(r"0\.[01](\.|$)", str(version)) else 1e-5
    if any(map(_SCALAR.match, theirs)):  # of versions from 0.6 on
        return 1e-5
    raise ValueError(
        'Eole checkpoint: config.json tells neither norm_eps nor eole_version; add "norm_eps" to its "model": 1e-06 if '
        "Eole 0.1 wrote it, 1e-05 if a later version did"
    )


def _tensors(directory: Path) -> dict[str, Tensor]:
    shards = sorted(directory.glob("model.[0-9]*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"from_pretrained: {directory} has no model.00.safetensors")
    theirs = {name: tensor for shard in shards for name, tensor in files.read_tensors(shard).items()}
    for name, tensor in theirs.items():
        if _SCALAR.match(name) and not torch.all(tensor == 1):
            raise ValueError(f"Eole checkpoint: {name} is {tensor.tolist()}; llmengine computes only 1")
    return theirs


def _in_barts_names(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With those that two modules share under both, and zeros where one layer has no bias of a kind that others have:
    one option asks for those of queries, keys and values, and for some versions' output projections of one side."""
    words = theirs.get("tgt_emb.embeddings.weight", theirs.get("src_emb.embeddings.weight"))
    shared = {name: words for name in ("tgt_emb.embeddings.weight", "generator.weight") if words is not None}
    tensors = renamed({**shared, **theirs}, _NAMES, _NO_PARAMETER)
    for kind in ("[qkv]_proj", "out_proj", "fc[12]"):
        weights = [name for name in tensors if re.search(rf"\.{kind}\.weight$", name)]
        biases = {name: f"{name.removesuffix('weight')}bias" for name in weights}
        if tensors.keys() & biases.values():
            zeros = {bias: tensors[name].new_zeros(len(tensors[name])) for name, bias in biases.items()}
            tensors = zeros | tensors
    return tensors


def _positions(embeddings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    fields: dict[str, Any] = dict(POSITIONS[embeddings.get("position_encoding_type", "SinusoidalInterleaved")])
    if fields["positions"] == "learned":
        rows = (len(tensors[f"model.{side}.embed_positions.weight"]) for side in ("encoder", "decoder"))
        fields["max_positions"] = of_both("Eole", "the number of positions", *rows)
    return fields


def _dropouts(training: Mapping[str, Any] | None) -> dict[str, float]:
    dropout, attention = last_of(training or {}, "dropout", 0.3), last_of(training or {}, "attention_dropout", 0.1)
    return {
        "dropout": dropout, "embed_dropout": dropout, "activation_dropout": dropout, "attention_dropout": attention,
    }  # fmt: skip


def _tokens(directory: Path) -> dict[str, Any]:
    if not (directory / VOCABULARY).is_file():
        return {}
    vocabulary = read_json(directory / VOCABULARY, "from_pretrained")
    specials = vocabulary.get("specials") or {}
    roles = {role: specials.get(role.removesuffix("_id"), default) for role, default in ROLES.items()}
    return token_fields(vocabulary, roles)
