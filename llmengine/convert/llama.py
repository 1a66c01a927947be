"""Llama (Touvron et al. 2023), Mistral, Qwen2, Qwen3 and Gemma 1 to 3 (text) as Hugging Face stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmengine.convert import rotary
from llmengine.convert.family import GROUPED, Family, Rule, copy, leaf, stacked
from llmengine.convert.gpt import LAST_TOKEN

_OURS, _LAYER = "decoder.layers.{i}.", "model.layers.{i}."
_FIELDS = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "d_model"),
    ("num_hidden_layers", "n_layers"),
    ("num_attention_heads", "n_heads"),
    ("num_key_value_heads", "n_kv_heads"),
    ("head_dim", "d_head"),
    ("intermediate_size", "d_ff"),
    ("max_position_embeddings", "max_positions"),
    ("hidden_act", "activation"),
    ("rms_norm_eps", "norm_eps"),
    ("attention_dropout", "attention_dropout"),
    ("initializer_range", "init_std"),
    ("tie_word_embeddings", "tie_embeddings"),
    ("pad_token_id", "pad_token_id"),
    ("bos_token_id", "bos_token_id"),
    ("eos_token_id", "eos_token_id"),
)
_BIASES = (("attention_bias", "qkv_bias"), ("attention_bias", "attention_bias"), ("mlp_bias", "feed_forward_bias"))
_QUIET = {"dropout": 0.0, "embed_dropout": 0.0}


def _tensors(*norms: tuple[str, str]) -> tuple[Rule, ...]:
    """norms: (ours, theirs) of a layer."""
    return (
        copy("decoder.embeddings.word.weight", "model.embed_tokens.weight"),
        *(copy(f"{_OURS}{ours}.weight", f"{_LAYER}{theirs}.weight") for ours, theirs in norms),
        *stacked(f"{_OURS}attention.qkv", *(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"), shares=GROUPED),
        *leaf(f"{_OURS}attention.out", f"{_LAYER}self_attn.o_proj"),
        *(rule for part in ("gate", "up", "down") for rule in leaf(
            f"{_OURS}feed_forward.{part}", f"{_LAYER}mlp.{part}_proj")),
        copy("decoder.final_norm.weight", "model.norm.weight"),
        copy("token_head.weight", "lm_head.weight"),
    )  # fmt: skip


_PRE = (("attention_norm", "input_layernorm"), ("feed_forward_norm", "post_attention_layernorm"))
_QK = (("attention.q_norm", "self_attn.q_norm"), ("attention.k_norm", "self_attn.k_norm"))
_SANDWICH = (
    ("attention_norm", "input_layernorm"),
    ("attention_post_norm", "post_attention_layernorm"),
    ("feed_forward_norm", "pre_feedforward_layernorm"),
    ("feed_forward_post_norm", "post_feedforward_layernorm"),
)


def _classes(name: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{name}ForCausalLM": ("clm",),
        f"{name}Model": (),
        f"{name}ForSequenceClassification": ("classification",),
        f"{name}ForTokenClassification": ("tagging",),
    }


def _write_rotary(ours: Mapping[str, Any]) -> dict[str, Any]:
    return rotary.write(ours["rotary"])


LLAMA = Family(
    name="llama",
    prefix="model.",
    heads=("lm_head.", "score."),
    fields=(*_FIELDS, *_BIASES),
    constants={"architecture": "decoder", "positions": "rotary", "norm": "rms", "gated": True, **_QUIET},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    derived={
        "num_key_value_heads": lambda config: config["num_attention_heads"],
        "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
    },
    demanded={"pretraining_tp": (1,)},
    without_effect=frozenset({"is_llama_config", "rope_interleaved"}),
    translated=rotary.FIELDS,
    translate=lambda theirs: {"rotary": rotary.read(theirs)},
    write_back=_write_rotary,
    classes=_classes("Llama"),
    class_fields={"LlamaForSequenceClassification": LAST_TOKEN},
    evidence={"clm": "model.embed_tokens.weight"},
    tensors=_tensors(*_PRE),
    heads_of={
        "classification": (copy("heads.classification.out.weight", "score.weight"),),
        "tagging": leaf("heads.tagging.out", "score"),
    },
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    skipped=r"rotary_emb\.inv_freq$",
)


# ---- Mistral, Qwen ---------------------------------------------------------------------------------------------------

_UNBIASED = {"qkv_bias": False, "attention_bias": False, "feed_forward_bias": False}


def _windows(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` keys are seen, the token's own among them."""
    width, types = theirs.get("sliding_window"), rotary.layer_types(theirs)
    if width is None or (types is not None and "window" not in types):
        return {"window": None, "layer_types": None}
    return {"window": width - 1, "layer_types": types}


def _write_windows(ours: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": None if ours["window"] is None else ours["window"] + 1,
        "layer_types": rotary.write_layer_types(ours),
    }


def _mistral(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {"rotary": rotary.read(theirs)} | _windows(theirs)


MISTRAL = replace(
    LLAMA,
    name="mistral",
    fields=_FIELDS,
    constants={**LLAMA.constants, **_UNBIASED},
    defaults=LLAMA.defaults
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    translated=rotary.FIELDS | {"sliding_window", "layer_types"},
    translate=_mistral,
    write_back=lambda ours: _write_rotary(ours) | {"sliding_window": _write_windows(ours)["sliding_window"]},
    classes=_classes("Mistral"),
    class_fields={"MistralForSequenceClassification": LAST_TOKEN},
)


def _qwen(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if not theirs["use_sliding_window"]:
        return {"rotary": rotary.read(theirs), "window": None, "layer_types": None}
    if not theirs.get("layer_types"):  # as older files say it
        first = theirs["max_window_layers"]
        types = ["full_attention" if i < first else "sliding_attention" for i in range(theirs["num_hidden_layers"])]
        theirs = {**theirs, "layer_types": types}
    return _mistral(theirs)


QWEN2 = replace(
    MISTRAL,
    name="qwen2",
    demanded={**LLAMA.demanded, "use_mrope": (False,)},
    fields=tuple((theirs, ours) for theirs, ours in _FIELDS if theirs != "head_dim"),
    constants={**LLAMA.constants, **_UNBIASED, "qkv_bias": True},
    defaults=LLAMA.defaults
    | {
        "vocab_size": 151936,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    derived={"num_key_value_heads": lambda config: config["num_attention_heads"]},
    without_effect=LLAMA.without_effect | {"max_window_layers", "attention_bias"},
    translated=rotary.FIELDS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    translate=_qwen,
    write_back=lambda ours: (
        _write_rotary(ours) | _write_windows(ours) | {"use_sliding_window": ours["window"] is not None}
    ),
    classes=_classes("Qwen2"),
    class_fields={"Qwen2ForSequenceClassification": LAST_TOKEN},
)
QWEN3 = replace(
    QWEN2,
    name="qwen3",
    fields=(*_FIELDS, *_BIASES[:2]),
    constants={**LLAMA.constants, "feed_forward_bias": False, "qk_norm": True},
    defaults=QWEN2.defaults | {"head_dim": 128},
    classes=_classes("Qwen3"),
    class_fields={"Qwen3ForSequenceClassification": LAST_TOKEN},
    without_effect=LLAMA.without_effect,
    tensors=_tensors(*_PRE, *_QK),
)


# ---- Gemma -----------------------------------------------------------------------------------------------------------


def _gemma_activation(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """hidden_activation where it is given; the first files' hidden_act "gelu" was always the tanh approximation."""
    name = theirs.get("hidden_activation")
    if name is None:
        name = "gelu_pytorch_tanh" if theirs.get("hidden_act") == "gelu" else theirs.get("hidden_act")
    if name != "gelu_pytorch_tanh":
        raise ValueError(
            f"config.json of family gemma: hidden_activation is {name!r}; llmengine computes gelu_pytorch_tanh"
        )
    return {"activation": "gelu_tanh"}


_GEMMA_FIELDS = tuple((theirs, ours) for theirs, ours in _FIELDS if ours != "activation")
GEMMA = replace(
    LLAMA,
    name="gemma",
    fields=(*_GEMMA_FIELDS, *_BIASES[:2]),
    constants={
        **LLAMA.constants,
        "norm": "rms_offset",
        "embed_scale": True,
        "feed_forward_bias": False,
        "activation": "gelu_tanh",
    },
    defaults=LLAMA.defaults
    | {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "intermediate_size": 24576,
        "max_position_embeddings": 8192,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
    demanded={"use_bidirectional_attention": (None, False)},
    translated=rotary.FIELDS | {"hidden_act", "hidden_activation"},
    translate=lambda theirs: _gemma_activation(theirs) | {"rotary": rotary.read(theirs)},
    write_back=lambda ours: _write_rotary(ours) | {"hidden_act": "gelu_pytorch_tanh"},
    classes=_classes("Gemma"),
    class_fields={"GemmaForSequenceClassification": LAST_TOKEN},
)


def _gemma2(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if not theirs.get("layer_types"):  # as older files say it
        pattern = theirs.get("sliding_window_pattern") or theirs["_sliding_window_pattern"]
        kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
                 for i in range(theirs["num_hidden_layers"])]  # fmt: skip
        theirs = {**theirs, "layer_types": kinds}
    return {
        **_gemma_activation(theirs),
        **_windows(theirs),
        "attention_scale": theirs["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": theirs["attn_logit_softcapping"] or 0.0,
        "logit_softcap": theirs["final_logit_softcapping"] or 0.0,
    }


def _write_gemma2(ours: Mapping[str, Any]) -> dict[str, Any]:
    scale = ours["attention_scale"] or (ours["d_head"] or ours["d_model"] // ours["n_heads"]) ** -0.5
    scalar = scale**-2
    return {
        **_write_rotary(ours),
        **_write_windows(ours),
        "sliding_window": 4096 if ours["window"] is None else ours["window"] + 1,  # theirs must be a number
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": ours["attention_softcap"] or None,
        "final_logit_softcapping": ours["logit_softcap"] or None,
    }


_GEMMA2_FIELDS = frozenset(
    "hidden_act hidden_activation sliding_window layer_types query_pre_attn_scalar attn_logit_softcapping "
    "final_logit_softcapping sliding_window_pattern _sliding_window_pattern".split()
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    constants={**GEMMA.constants, "norm_place": "sandwich"},
    defaults=GEMMA.defaults
    | {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "_sliding_window_pattern": 2,
    },
    without_effect=LLAMA.without_effect | {"cache_implementation"},
    translated=rotary.FIELDS | _GEMMA2_FIELDS,
    translate=lambda theirs: _gemma2(theirs) | {"rotary": rotary.read(theirs)},
    write_back=_write_gemma2,
    classes=_classes("Gemma2"),
    class_fields={"Gemma2ForSequenceClassification": LAST_TOKEN},
    tensors=_tensors(*_SANDWICH),
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    # a field that is Gemma 2's: their Gemma 3 has it and computes nothing with it
    demanded={**GEMMA2.demanded, "attn_logit_softcapping": (None,)},
    constants={**GEMMA2.constants, "qk_norm": True},
    defaults=GEMMA2.defaults
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "_sliding_window_pattern": 6,
    },
    translate=lambda theirs: (
        _gemma2(theirs) | {"rotary": rotary.read(theirs, theta=1_000_000.0, window_theta=10_000.0)}
    ),
    classes={
        "Gemma3ForCausalLM": ("clm",),
        "Gemma3TextModel": (),
        "Gemma3TextForSequenceClassification": ("classification",),
    },
    class_fields={"Gemma3TextForSequenceClassification": LAST_TOKEN},
    tensors=_tensors(*_SANDWICH, *_QK),
)
