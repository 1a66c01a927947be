"""Published shapes by name, and small ones of the same families. A new size or family is a few lines of data."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]


def _shape(layers: int, heads: int, d_model: int, d_ff: int | None = None, **more: Any) -> Fields:
    return {"n_layers": layers, "n_heads": heads, "d_model": d_model, "d_ff": d_ff or 4 * d_model, **more}


# ---- encoders --------------------------------------------------------------------------------------------------------

# Devlin et al. 2019
_BERT: Fields = {
    "family": "bert",
    "architecture": "encoder",
    "objectives": ["mlm", "nsp"],
    "vocab_size": 30522,
    "max_positions": 512,
    "type_vocab_size": 2,
    "activation": "gelu",
    "norm_eps": 1e-12,
    "norm_place": "post",
    "embed_norm": True,
    "final_norm": False,
    "pooler": "cls_tanh",
    "head_transform": True,
    "head_bias": True,
    "pad_token_id": 0,
    "freeze_padding_row": True,
}
# Liu et al. 2019
_ROBERTA: Fields = _BERT | {
    "family": "roberta",
    "objectives": ["mlm"],
    "vocab_size": 50265,
    "type_vocab_size": 1,
    "norm_eps": 1e-5,
    "pooler": "none",
    "position_offset": 2,
    "position_of": "token",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
# Lan et al. 2019
_ALBERT: Fields = _BERT | {
    "family": "albert",
    "objectives": ["mlm", "sop"],
    "vocab_size": 30000,
    "d_embed": 128,
    "share_layers": True,
    "activation": "gelu_tanh",
    "dropout": 0.0,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# Clark et al. 2020
_ELECTRA: Fields = _BERT | {"family": "electra", "objectives": ["rtd"], "pooler": "none"}
# Warner et al. 2024
_MODERNBERT: Fields = {
    "family": "modernbert",
    "architecture": "encoder",
    "objectives": ["mlm"],
    "vocab_size": 50368,
    "max_positions": 8192,
    "positions": "rotary",
    "rotary": {"theta": 160000.0, "window_theta": 10000.0},
    "window": 64,
    "embed_norm": True,
    "first_norm": False,
    "norm_bias": False,
    "qkv_bias": False,
    "attention_bias": False,
    "feed_forward_bias": False,
    "gated": True,
    "head_transform": True,
    "head_transform_bias": False,
    "head_bias": True,
    "classifier": "dense_norm",
    "dropout": 0.0,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
    "scale_residual_init": True,
    "freeze_padding_row": True,
}
_MODERNBERT_TOKENS: Fields = {"pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282}
# Yang et al. 2019
_XLNET: Fields = {
    "family": "xlnet",
    "architecture": "encoder",
    "objectives": ["plm"],
    "vocab_size": 32000,
    "max_positions": None,
    "positions": "relative",
    "norm_eps": 1e-12,
    "norm_place": "post",
    "final_norm": False,
    "head_bias": True,
    "summary": "last",
    "classifier": "dense_tanh",
    "activation_dropout": 0.1,
    "final_dropout": 0.1,
    "pad_token_id": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# ---- decoders --------------------------------------------------------------------------------------------------------

# what classifies is the last token, the only one that sees all others
_LAST_TOKEN: Fields = {"summary": "last", "classifier_bias": False}
# Radford et al. 2018, 2019
_GPT2: Fields = {
    "family": "gpt2",
    "architecture": "decoder",
    "objectives": ["clm"],
    **_LAST_TOKEN,
    "vocab_size": 50257,
    "max_positions": 1024,
    "activation": "gelu_tanh",
    "norm_eps": 1e-5,
    "norm_place": "pre",
    "final_norm": True,
    "scale_residual_init": True,
}
_GPT2_VOCABULARY: Fields = {"bos_token_id": 50256, "eos_token_id": 50256}
_GPT: Fields = {
    "family": "openai-gpt",
    "architecture": "decoder",
    "objectives": ["clm"],
    **_LAST_TOKEN,
    "vocab_size": 40478,
    "max_positions": 512,
    "activation": "gelu_tanh",
    "norm_place": "post",
    "final_norm": False,
}
_QUIET: Fields = {"dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
# Black et al. 2021
_GPT_NEO: Fields = _GPT2 | _GPT2_VOCABULARY | _QUIET | {
    "family": "gpt_neo",
    "max_positions": 2048,
    "attention_scale": 1.0,
    "qkv_bias": False,
    "window": 255,
    "scale_residual_init": False,
}  # fmt: skip
# Black et al. 2022; Biderman et al. 2023
_GPT_NEOX: Fields = _QUIET | {
    "family": "gpt_neox",
    "architecture": "decoder",
    "objectives": ["clm"],
    **_LAST_TOKEN,
    "vocab_size": 50304,
    "max_positions": 2048,
    "positions": "rotary",
    "rotary": {"fraction": 0.25},
    "norm_place": "parallel",
    "tie_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Touvron et al. 2023
_LLAMA: Fields = _QUIET | {
    "family": "llama",
    "architecture": "decoder",
    "objectives": ["clm"],
    **_LAST_TOKEN,
    "vocab_size": 32000,
    "max_positions": 2048,
    "positions": "rotary",
    "norm": "rms",
    "norm_eps": 1e-5,
    "qkv_bias": False,
    "attention_bias": False,
    "feed_forward_bias": False,
    "activation": "silu",
    "gated": True,
    "tie_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3: Fields = _LLAMA | {
    "vocab_size": 128256,
    "max_positions": 131072,
    "rotary": {
        "theta": 500000.0, "scaling": "llama3", "factor": 8.0, "original_positions": 8192, "low_frequency": 1.0,
        "high_frequency": 4.0,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
_QWEN: Fields = _LLAMA | {
    "vocab_size": 151936,
    "max_positions": 32768,
    "rotary": {"theta": 1000000.0},
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "bos_token_id": 151643,
}
_GEMMA: Fields = _LLAMA | {
    "vocab_size": 256000,
    "max_positions": 8192,
    "norm": "rms_offset",
    "norm_eps": 1e-6,
    "activation": "gelu_tanh",
    "embed_scale": True,
    "tie_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "d_head": 256,
}

# ---- encoder-decoders ------------------------------------------------------------------------------------------------

# Lewis et al. 2019
_BART: Fields = {
    "family": "bart",
    "architecture": "encoder_decoder",
    "objectives": ["seq2seq"],
    "vocab_size": 50265,
    "max_positions": 1024,
    "position_offset": 2,
    "activation": "gelu",
    "norm_place": "post",
    "embed_norm": True,
    "final_norm": False,
    "head_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "freeze_padding_row": True,
}
# Raffel et al. 2020
_T5: Fields = {
    "family": "t5",
    "architecture": "encoder_decoder",
    "objectives": ["seq2seq"],
    "vocab_size": 32128,
    "max_positions": None,
    "positions": "buckets",
    "norm": "rms",
    "norm_eps": 1e-6,
    "attention_scale": 1.0,
    "qkv_bias": False,
    "attention_bias": False,
    "feed_forward_bias": False,
    "activation": "relu",
    "activation_dropout": 0.1,
    "final_dropout": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# Vaswani et al. 2017, as fairseq and OpenNMT build it
_TRANSFORMER: Fields = {
    "family": "custom",
    "architecture": "encoder_decoder",
    "objectives": ["seq2seq"],
    "vocab_size": 37000,
    "max_positions": 1024,
    "positions": "sinusoid",
    "embed_scale": True,
    "activation": "relu",
    "norm_place": "post",
    "final_norm": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "freeze_padding_row": True,
}


def _alternating(layers: int, every: int, first: str, other: str) -> list[str]:
    return [first if i % every == 0 else other for i in range(layers)]


def _t5(layers: int, heads: int, d_model: int, d_ff: int, **more: Any) -> Fields:
    return _T5 | _shape(layers, heads, d_model, d_ff, d_head=64, head_scale=d_model**-0.5, **more)


PRESETS: dict[str, Fields] = {
    "bert-base": _BERT | _shape(12, 12, 768),
    "bert-large": _BERT | _shape(24, 16, 1024),
    # Turc et al. 2019
    "bert-tiny": _BERT | _shape(2, 2, 128),
    "bert-mini": _BERT | _shape(4, 4, 256),
    "bert-small": _BERT | _shape(4, 8, 512),
    "roberta-base": _ROBERTA | _shape(12, 12, 768),
    "roberta-large": _ROBERTA | _shape(24, 16, 1024),
    "albert-base": _ALBERT | _shape(12, 12, 768),
    "albert-large": _ALBERT | _shape(24, 16, 1024),
    "electra-small": _ELECTRA | _shape(12, 4, 256, d_embed=128),
    "electra-base": _ELECTRA | _shape(12, 12, 768),
    "modernbert-base": _MODERNBERT | _MODERNBERT_TOKENS | _shape(22, 12, 768, 1152)
    | {"layer_types": _alternating(22, 3, "full", "window")},
    "modernbert-large": _MODERNBERT | _MODERNBERT_TOKENS | _shape(28, 16, 1024, 2624)
    | {"layer_types": _alternating(28, 3, "full", "window")},
    "modernbert-tiny": _MODERNBERT | _shape(4, 2, 128, 256)
    | {"layer_types": _alternating(4, 3, "full", "window"), "pad_token_id": 0},
    "xlnet-base": _XLNET | _shape(12, 12, 768),
    "xlnet-large": _XLNET | _shape(24, 16, 1024),
    "xlnet-tiny": _XLNET | _shape(2, 2, 128),
    "gpt": _GPT | _shape(12, 12, 768),
    "gpt2": _GPT2 | _GPT2_VOCABULARY | _shape(12, 12, 768),
    "gpt2-medium": _GPT2 | _GPT2_VOCABULARY | _shape(24, 16, 1024),
    "gpt2-large": _GPT2 | _GPT2_VOCABULARY | _shape(36, 20, 1280),
    "gpt2-xl": _GPT2 | _GPT2_VOCABULARY | _shape(48, 25, 1600),
    "gpt-tiny": _GPT2 | _shape(2, 2, 128),
    "gpt-mini": _GPT2 | _shape(4, 4, 256),
    "gpt-small": _GPT2 | _shape(4, 8, 512),
    "gpt-neo-125m": _GPT_NEO | _shape(12, 12, 768) | {"layer_types": _alternating(12, 2, "full", "window")},
    "pythia-160m": _GPT_NEOX | _shape(12, 12, 768),
    "pythia-1b": _GPT_NEOX | _shape(16, 8, 2048),
    "llama-7b": _LLAMA | _shape(32, 32, 4096, 11008, norm_eps=1e-6),
    "llama-3.1-8b": _LLAMA3 | _shape(32, 32, 4096, 14336, n_kv_heads=8),
    "llama-tiny": _LLAMA | _shape(2, 4, 128, 384, n_kv_heads=2),
    "smollm2-135m": _LLAMA | _shape(30, 9, 576, 1536, n_kv_heads=3) | {
        "vocab_size": 49152, "max_positions": 8192, "rotary": {"theta": 100000.0}, "tie_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "init_std": 0.041666666666666664,
    },
    "mistral-7b": _LLAMA | _shape(32, 32, 4096, 14336, n_kv_heads=8)
    | {"family": "mistral", "max_positions": 32768, "window": 4095},
    "qwen2.5-0.5b": _QWEN | _shape(24, 14, 896, 4864, n_kv_heads=2)
    | {"family": "qwen2", "qkv_bias": True, "eos_token_id": 151643},
    "qwen3-0.6b": _QWEN | _shape(28, 16, 1024, 3072, n_kv_heads=8, d_head=128)
    | {"family": "qwen3", "qk_norm": True, "max_positions": 40960, "eos_token_id": 151645},
    "gemma-2b": _GEMMA | _shape(18, 8, 2048, 16384, n_kv_heads=1) | {"family": "gemma"},
    "gemma2-2b": _GEMMA | _shape(26, 8, 2304, 9216, n_kv_heads=4) | {
        "family": "gemma2", "norm_place": "sandwich", "window": 4095, "attention_scale": 256**-0.5,
        "attention_softcap": 50.0, "logit_softcap": 30.0, "layer_types": _alternating(26, 2, "window", "full"),
    },
    "gemma3-1b": _GEMMA | _shape(26, 4, 1152, 6912, n_kv_heads=1) | {
        "family": "gemma3_text", "vocab_size": 262144, "max_positions": 32768, "norm_place": "sandwich",
        "qk_norm": True, "window": 511, "attention_scale": 256**-0.5, 
        "rotary": {"theta": 1000000.0, "window_theta": 10000.0},
        "layer_types": ["full" if (i + 1) % 6 == 0 else "window" for i in range(26)],
    },
    "bart-base": _BART | _shape(6, 12, 768),
    "bart-large": _BART | _shape(12, 16, 1024),
    "bart-tiny": _BART | _shape(2, 2, 128),
    "mbart-large": _BART | _shape(12, 16, 1024) | {
        "family": "mbart", "vocab_size": 250027, "norm_place": "pre", "final_norm": True, "embed_scale": True,
        "decoder_start_token_id": None,
    },
    "opus-mt": _BART | _shape(6, 8, 512) | {
        "family": "marian", "vocab_size": 58101, "max_positions": 512, "position_offset": 0, "embed_norm": False,
        "positions": "sinusoid_halves", "activation": "silu", "embed_scale": True, "pad_token_id": 58100,
        "bos_token_id": None, "eos_token_id": 0, "decoder_start_token_id": 58100,
    },
    "t5-small": _t5(6, 8, 512, 2048),
    "t5-base": _t5(12, 12, 768, 3072),
    "t5-large": _t5(24, 16, 1024, 4096),
    "t5-v1.1-small": _t5(8, 6, 512, 1024)
    | {"gated": True, "activation": "gelu_tanh", "tie_embeddings": False, "head_scale": 1.0},
    "t5-tiny": _t5(2, 2, 128, 384),
    "transformer-base": _TRANSFORMER | _shape(6, 8, 512),
    "transformer-big": _TRANSFORMER | _shape(6, 16, 1024) | {"dropout": 0.3, "embed_dropout": 0.3},
    "transformer-tiny": _TRANSFORMER | _shape(2, 2, 128),
}  # fmt: skip
