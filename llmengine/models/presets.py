"""Published shapes by name, and small ones of the same families. A new size or family is a few lines of data."""

from __future__ import annotations

from typing import Any

# Devlin et al. 2019
_BERT: dict[str, Any] = {
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
# Radford et al. 2019
_GPT2: dict[str, Any] = {
    "family": "gpt2",
    "architecture": "decoder",
    "objectives": ["clm"],
    "vocab_size": 50257,
    "max_positions": 1024,
    "activation": "gelu_tanh",
    "norm_eps": 1e-5,
    "norm_place": "pre",
    "final_norm": True,
    "scale_residual_init": True,
}
_GPT2_VOCABULARY: dict[str, Any] = {"bos_token_id": 50256, "eos_token_id": 50256}


def _shape(layers: int, heads: int, d_model: int) -> dict[str, int]:
    return {"n_layers": layers, "n_heads": heads, "d_model": d_model, "d_ff": 4 * d_model}


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": _BERT | _shape(12, 12, 768),
    "bert-large": _BERT | _shape(24, 16, 1024),
    # Turc et al. 2019
    "bert-tiny": _BERT | _shape(2, 2, 128),
    "bert-mini": _BERT | _shape(4, 4, 256),
    "bert-small": _BERT | _shape(4, 8, 512),
    "gpt2": _GPT2 | _GPT2_VOCABULARY | _shape(12, 12, 768),
    "gpt2-medium": _GPT2 | _GPT2_VOCABULARY | _shape(24, 16, 1024),
    "gpt2-large": _GPT2 | _GPT2_VOCABULARY | _shape(36, 20, 1280),
    "gpt2-xl": _GPT2 | _GPT2_VOCABULARY | _shape(48, 25, 1600),
    "gpt-tiny": _GPT2 | _shape(2, 2, 128),
    "gpt-mini": _GPT2 | _shape(4, 4, 256),
    "gpt-small": _GPT2 | _shape(4, 8, 512),
}
