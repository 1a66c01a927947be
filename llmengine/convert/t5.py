"""T5 (Raffel et al. 2020) and T5 v1.1 as Hugging Face stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmengine.convert.family import Family, Rule, concatenate, copy, leaf

_PREFIX = "transformer."  # only classification models have it


def _stack(side: str, mark: str) -> tuple[Rule, ...]:
    ours, block = f"{side}.layers.{mark}.", f"{_PREFIX}{side}.block.{mark}.layer."
    last = 1 if side == "encoder" else 2

    def attention(name: str, layer: int, theirs: str) -> tuple[Rule, ...]:
        return (
            copy(f"{ours}{name}_norm.weight", f"{block}{layer}.layer_norm.weight"),
            copy(f"{ours}{name}.out.weight", f"{block}{layer}.{theirs}.o.weight"),
        )

    dense = f"{block}{last}.DenseReluDense."
    rules = (
        *attention("attention", 0, "SelfAttention"),
        concatenate(f"{ours}attention.qkv.weight", *(f"{block}0.SelfAttention.{part}.weight" for part in "qkv")),
        copy(
            f"{side}.distance_buckets.embedding.weight",
            f"{_PREFIX}{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        copy(f"{ours}feed_forward_norm.weight", f"{block}{last}.layer_norm.weight"),
        copy(f"{ours}feed_forward.down.weight", f"{dense}wo.weight"),
        copy(f"{side}.final_norm.weight", f"{_PREFIX}{side}.final_layer_norm.weight"),
    )
    if side == "encoder":
        return rules
    return (
        *rules,
        *attention("cross_attention", 1, "EncDecAttention"),
        copy(f"{ours}cross_attention.q.weight", f"{block}1.EncDecAttention.q.weight"),
        concatenate(f"{ours}cross_attention.kv.weight", *(f"{block}1.EncDecAttention.{part}.weight" for part in "kv")),
    )


def _feed_forward(side: str, mark: str, gated: bool) -> tuple[Rule, ...]:
    ours = f"{side}.layers.{mark}.feed_forward."
    dense = f"{_PREFIX}{side}.block.{mark}.layer.{1 if side == 'encoder' else 2}.DenseReluDense."
    if not gated:
        return (copy(f"{ours}up.weight", f"{dense}wi.weight"),)
    return copy(f"{ours}gate.weight", f"{dense}wi_0.weight"), copy(f"{ours}up.weight", f"{dense}wi_1.weight")


# Their gated "gelu" is the tanh approximation.
_ACTIVATIONS = {"relu": "relu", "relu2": "relu_squared", "gelu": "gelu_tanh", "silu": "silu"}


def _translate(theirs: Mapping[str, Any]) -> dict[str, Any]:
    projection = theirs["feed_forward_proj"]
    gated, name = projection.startswith("gated-"), projection.removeprefix("gated-")
    if name not in _ACTIVATIONS or (name == "gelu" and not gated):
        raise ValueError(f"config.json of family t5: feed_forward_proj is {projection!r}, unknown to llmengine")
    scaled = theirs.get("scale_decoder_outputs", theirs["tie_word_embeddings"])
    depth = theirs["num_decoder_layers"]
    return {
        "gated": gated,
        "activation": _ACTIVATIONS[name],
        "head_scale": theirs["d_model"] ** -0.5 if scaled else 1.0,
        "n_decoder_layers": None if depth in (None, theirs["num_layers"]) else depth,
    }


def _write_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    names = {ours_: theirs for theirs, ours_ in _ACTIVATIONS.items()}
    return {
        "is_encoder_decoder": True,
        "feed_forward_proj": ("gated-" if ours["gated"] else "") + names.get(ours["activation"], ours["activation"]),
        "scale_decoder_outputs": ours["head_scale"] != 1.0,
        "num_decoder_layers": ours["n_decoder_layers"] or ours["n_layers"],
    }


T5 = Family(
    name="t5",
    prefix=_PREFIX,
    heads=("lm_head.", "classification_head.", "qa_outputs."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("d_model", "d_model"),
        ("num_layers", "n_layers"),
        ("num_heads", "n_heads"),
        ("d_kv", "d_head"),
        ("d_ff", "d_ff"),
        ("relative_attention_num_buckets", "position_buckets"),
        ("relative_attention_max_distance", "position_bucket_distance"),
        ("layer_norm_epsilon", "norm_eps"),
        ("dropout_rate", "dropout"),
        ("dropout_rate", "embed_dropout"),
        ("dropout_rate", "attention_dropout"),
        ("dropout_rate", "activation_dropout"),
        ("dropout_rate", "final_dropout"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("decoder_start_token_id", "decoder_start_token_id"),
    ),
    constants={
        "architecture": "encoder_decoder",
        "positions": "buckets",
        "max_positions": None,
        "norm": "rms",
        "attention_scale": 1.0,
        "qkv_bias": False,
        "attention_bias": False,
        "feed_forward_bias": False,
    },
    defaults={
        "vocab_size": 32128,
        "d_model": 512,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "d_kv": 64,
        "d_ff": 2048,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "relu",
    },
    demanded={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    without_effect=frozenset("n_positions initializer_factor dense_act_fn is_gated_act bos_token_id".split()),
    translated=frozenset({"feed_forward_proj", "scale_decoder_outputs", "num_decoder_layers"}),
    translate=_translate,
    write_back=_write_back,
    classes={
        "T5ForConditionalGeneration": ("seq2seq",),
        "T5Model": (),
        "T5ForSequenceClassification": ("classification",),
    },
    unprefixed=frozenset({"T5ForConditionalGeneration", "T5Model"}),
    class_fields={"T5ForSequenceClassification": {"classifier": "dense_tanh", "summary": "last"}},
    evidence={"seq2seq": f"{_PREFIX}shared.weight"},
    tensors=(
        copy("encoder.embeddings.word.weight", f"{_PREFIX}shared.weight"),
        *_stack("encoder", "{i}"),
        *_stack("decoder", "{j}"),
        copy("token_head.weight", "lm_head.weight"),
    ),
    variants=lambda ours: (
        *_feed_forward("encoder", "{i}", ours["gated"]),
        *_feed_forward("decoder", "{j}", ours["gated"]),
    ),
    heads_of={
        "classification": (
            *leaf("heads.classification.dense", "classification_head.dense"),
            *leaf("heads.classification.out", "classification_head.out_proj"),
        ),
    },
    tied={
        "lm_head.weight": f"{_PREFIX}shared.weight",
        f"{_PREFIX}encoder.embed_tokens.weight": f"{_PREFIX}shared.weight",
        f"{_PREFIX}decoder.embed_tokens.weight": f"{_PREFIX}shared.weight",
    },
    # Transformers 5 writes that they are tied of all models
    apart={"tie_embeddings": ("lm_head.weight", f"{_PREFIX}shared.weight")},
    # published files have it, but attention to an encoder has no bias
    skipped=r"EncDecAttention\.relative_attention_bias\.weight$",
)
