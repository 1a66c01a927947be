"""GPT (Radford et al. 2018), GPT-2 (2019), GPT-Neo and GPT-NeoX (Black et al. 2021, 2022) as Hugging Face stores them.

Conv1D weights of the first two are (in, out), the transpose of nn.Linear's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmengine.convert import rotary
from llmengine.convert.family import Family, Rule, by_head, concatenate, copy, leaf, transpose

_LAYER = "transformer.h.{i}."
_OURS = "decoder.layers.{i}."


# How decoders classify: a matrix on the last token.
LAST_TOKEN = {"classifier_bias": False, "summary": "last"}
# Of a classification head that no class here has.
_SUMMARY = frozenset(
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout".split()
)


def _conv(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return transpose(f"{ours}.weight", f"{theirs}.weight"), copy(f"{ours}.bias", f"{theirs}.bias")


GPT2 = Family(
    name="gpt2",
    prefix="transformer.",
    heads=("lm_head.", "score.", "classifier.", "qa_outputs."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("n_embd", "d_model"),
        ("n_layer", "n_layers"),
        ("n_head", "n_heads"),
        ("n_inner", "d_ff"),
        ("n_positions", "max_positions"),
        ("activation_function", "activation"),
        ("layer_norm_epsilon", "norm_eps"),
        ("resid_pdrop", "dropout"),
        ("embd_pdrop", "embed_dropout"),
        ("attn_pdrop", "attention_dropout"),
        ("initializer_range", "init_std"),
        ("scale_attn_by_inverse_layer_idx", "attention_scale_by_layer"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={"architecture": "decoder", "scale_residual_init": True},
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "initializer_range": 0.02,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    derived={"n_inner": lambda config: 4 * config["n_embd"]},
    demanded={"scale_attn_weights": (True,)},
    # reorder_and_upcast_attn asks for float32 scores, which ours are anyway
    without_effect=_SUMMARY | {"reorder_and_upcast_attn", "n_ctx"},
    classes={
        "GPT2LMHeadModel": ("clm",),
        "GPT2Model": (),
        "GPT2ForSequenceClassification": ("classification",),
        "GPT2ForTokenClassification": ("tagging",),
        "GPT2ForQuestionAnswering": ("qa",),
    },
    class_fields={"GPT2ForSequenceClassification": LAST_TOKEN},
    evidence={"clm": "transformer.wte.weight"},
    tensors=(
        copy("decoder.embeddings.word.weight", "transformer.wte.weight"),
        copy("decoder.embeddings.position.weight", "transformer.wpe.weight"),
        *leaf(f"{_OURS}attention_norm", f"{_LAYER}ln_1"),
        *_conv(f"{_OURS}attention.qkv", f"{_LAYER}attn.c_attn"),
        *_conv(f"{_OURS}attention.out", f"{_LAYER}attn.c_proj"),
        *leaf(f"{_OURS}feed_forward_norm", f"{_LAYER}ln_2"),
        *_conv(f"{_OURS}feed_forward.up", f"{_LAYER}mlp.c_fc"),
        *_conv(f"{_OURS}feed_forward.down", f"{_LAYER}mlp.c_proj"),
        *leaf("decoder.final_norm", "transformer.ln_f"),
        copy("token_head.weight", "lm_head.weight"),
    ),
    heads_of={
        "classification": (copy("heads.classification.out.weight", "score.weight"),),
        "tagging": leaf("heads.tagging.out", "classifier"),
        "qa": leaf("heads.qa", "qa_outputs"),
    },
    tied={"lm_head.weight": "transformer.wte.weight"},
    skipped=r"\.attn\.(bias|masked_bias)$",
)


def _gpt(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if theirs["afn"] != "gelu":
        raise ValueError(f"config.json of family openai-gpt: afn is {theirs['afn']!r}; llmengine computes only 'gelu'")
    return {"d_ff": 4 * theirs["n_embd"]}


GPT = replace(
    GPT2,
    name="openai-gpt",
    fields=tuple(
        (theirs, ours) for theirs, ours in GPT2.fields if ours not in ("d_ff", "activation", "attention_scale_by_layer")
    ),
    constants={"architecture": "decoder", "norm_place": "post", "final_norm": False, "activation": "gelu_tanh"},
    defaults=GPT2.defaults
    | {"vocab_size": 40478, "n_positions": 512, "afn": "gelu", "bos_token_id": None, "eos_token_id": None},
    derived={},
    demanded={},
    without_effect=_SUMMARY | {"predict_special_tokens", "n_ctx", "n_special"},
    classes={
        "OpenAIGPTLMHeadModel": ("clm",),
        "OpenAIGPTModel": (),
        "OpenAIGPTForSequenceClassification": ("classification",),
    },
    class_fields={"OpenAIGPTForSequenceClassification": LAST_TOKEN},
    evidence={"clm": "transformer.tokens_embed.weight"},
    tensors=(
        copy("decoder.embeddings.word.weight", "transformer.tokens_embed.weight"),
        copy("decoder.embeddings.position.weight", "transformer.positions_embed.weight"),
        *(rule for rule in GPT2.tensors if "layers" in rule.ours[0]),
        copy("token_head.weight", "lm_head.weight"),
    ),
    tied={"lm_head.weight": "transformer.tokens_embed.weight"},
    skipped=r"\.attn\.bias$|position_ids$",
    translated=frozenset({"afn"}),  # their "gelu" is the tanh approximation
    translate=_gpt,
    write_back=lambda ours: {"afn": "gelu"},
)


# ---- GPT-Neo ---------------------------------------------------------------------------------------------------------


def _neo(theirs: Mapping[str, Any]) -> dict[str, Any]:
    kinds = [kind for pattern, times in theirs["attention_types"] for kind in list(pattern) * times]
    types = [{"global": "full", "local": "window"}[kind] for kind in kinds]
    local = "window" in types
    return {"layer_types": types if local else None, "window": theirs["window_size"] - 1 if local else None}


def _neo_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    types = ours["layer_types"] or ["full" if ours["window"] is None else "window"] * ours["n_layers"]
    kinds = [{"full": "global", "window": "local"}[kind] for kind in types]
    return {"attention_types": [[kinds, 1]], "window_size": 256 if ours["window"] is None else ours["window"] + 1}


_NEO_LAYER = "transformer.h.{i}."
GPT_NEO = Family(
    name="gpt_neo",
    prefix="transformer.",
    heads=("lm_head.", "score.", "classifier.", "qa_outputs."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "d_model"),
        ("num_layers", "n_layers"),
        ("num_heads", "n_heads"),
        ("intermediate_size", "d_ff"),
        ("max_position_embeddings", "max_positions"),
        ("activation_function", "activation"),
        ("layer_norm_epsilon", "norm_eps"),
        ("resid_dropout", "dropout"),
        ("embed_dropout", "embed_dropout"),
        ("attention_dropout", "attention_dropout"),
        ("initializer_range", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={"architecture": "decoder", "attention_scale": 1.0, "qkv_bias": False},
    defaults={
        "vocab_size": 50257,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "intermediate_size": None,
        "max_position_embeddings": 2048,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "attention_types": [[["global", "local"], 12]],
        "window_size": 256,
    },
    derived={"intermediate_size": lambda config: 4 * config["hidden_size"]},
    demanded={},
    without_effect=_SUMMARY | {"attention_layers"},
    translated=frozenset({"attention_types", "window_size"}),
    translate=_neo,
    write_back=_neo_back,
    classes={
        "GPTNeoForCausalLM": ("clm",),
        "GPTNeoModel": (),
        "GPTNeoForSequenceClassification": ("classification",),
        "GPTNeoForTokenClassification": ("tagging",),
        "GPTNeoForQuestionAnswering": ("qa",),
    },
    class_fields={"GPTNeoForSequenceClassification": LAST_TOKEN},
    evidence={"clm": "transformer.wte.weight"},
    tensors=(
        copy("decoder.embeddings.word.weight", "transformer.wte.weight"),
        copy("decoder.embeddings.position.weight", "transformer.wpe.weight"),
        *leaf(f"{_OURS}attention_norm", f"{_NEO_LAYER}ln_1"),
        concatenate(
            f"{_OURS}attention.qkv.weight", *(f"{_NEO_LAYER}attn.attention.{part}_proj.weight" for part in "qkv")
        ),
        *leaf(f"{_OURS}attention.out", f"{_NEO_LAYER}attn.attention.out_proj"),
        *leaf(f"{_OURS}feed_forward_norm", f"{_NEO_LAYER}ln_2"),
        *leaf(f"{_OURS}feed_forward.up", f"{_NEO_LAYER}mlp.c_fc"),
        *leaf(f"{_OURS}feed_forward.down", f"{_NEO_LAYER}mlp.c_proj"),
        *leaf("decoder.final_norm", "transformer.ln_f"),
        copy("token_head.weight", "lm_head.weight"),
    ),
    heads_of=GPT2.heads_of,
    tied={"lm_head.weight": "transformer.wte.weight"},
    skipped=r"\.attn\.attention\.(bias|masked_bias)$",
)


# ---- GPT-NeoX --------------------------------------------------------------------------------------------------------


def _neox(theirs: Mapping[str, Any]) -> dict[str, Any]:
    place = "parallel" if theirs["use_parallel_residual"] else "pre"
    return {"rotary": rotary.read(theirs, partial=0.25), "norm_place": place}


def _neox_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    return rotary.write(ours["rotary"], partial=True) | {"use_parallel_residual": ours["norm_place"] == "parallel"}


_NEOX_LAYER = "gpt_neox.layers.{i}."
GPT_NEOX = Family(
    name="gpt_neox",
    prefix="gpt_neox.",
    heads=("embed_out.", "score.", "classifier.", "qa_outputs."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "d_model"),
        ("num_hidden_layers", "n_layers"),
        ("num_attention_heads", "n_heads"),
        ("intermediate_size", "d_ff"),
        ("max_position_embeddings", "max_positions"),
        ("hidden_act", "activation"),
        ("layer_norm_eps", "norm_eps"),
        ("hidden_dropout", "dropout"),
        ("hidden_dropout", "embed_dropout"),
        ("attention_dropout", "attention_dropout"),
        ("attention_bias", "qkv_bias"),
        ("attention_bias", "attention_bias"),
        ("initializer_range", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={"architecture": "decoder", "positions": "rotary"},
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_bias": True,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "use_parallel_residual": True,
    },
    demanded={},
    without_effect=frozenset(),
    translated=rotary.FIELDS | {"use_parallel_residual"},
    translate=_neox,
    write_back=_neox_back,
    classes={
        "GPTNeoXForCausalLM": ("clm",),
        "GPTNeoXModel": (),
        "GPTNeoXForSequenceClassification": ("classification",),
        "GPTNeoXForTokenClassification": ("tagging",),
        "GPTNeoXForQuestionAnswering": ("qa",),
    },
    class_fields={"GPTNeoXForSequenceClassification": LAST_TOKEN},
    evidence={"clm": "embed_out.weight"},
    tensors=(
        copy("decoder.embeddings.word.weight", "gpt_neox.embed_in.weight"),
        *leaf(f"{_OURS}attention_norm", f"{_NEOX_LAYER}input_layernorm"),
        *(
            by_head(f"{_OURS}attention.qkv.{kind}", f"{_NEOX_LAYER}attention.query_key_value.{kind}")
            for kind in ("weight", "bias")
        ),
        *leaf(f"{_OURS}attention.out", f"{_NEOX_LAYER}attention.dense"),
        *leaf(f"{_OURS}feed_forward_norm", f"{_NEOX_LAYER}post_attention_layernorm"),
        *leaf(f"{_OURS}feed_forward.up", f"{_NEOX_LAYER}mlp.dense_h_to_4h"),
        *leaf(f"{_OURS}feed_forward.down", f"{_NEOX_LAYER}mlp.dense_4h_to_h"),
        *leaf("decoder.final_norm", "gpt_neox.final_layer_norm"),
        copy("token_head.weight", "embed_out.weight"),
    ),
    heads_of=GPT2.heads_of,
    tied={"embed_out.weight": "gpt_neox.embed_in.weight"},
    skipped=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
)
