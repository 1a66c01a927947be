"""Tiny Hugging Face models as oracles, their weights perturbed so that zero biases and unit norms hide nothing."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from llmengine import Transformer
from llmengine.convert import FAMILIES

VOCABULARY = 61
_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 24,
}  # fmt: skip
_LLAMA = _ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GEMMA = _LLAMA | {"head_dim": 6, "query_pre_attn_scalar": 12, "sliding_window": 5}
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
SHAPES = {
    "bert": _ENCODER | {"type_vocab_size": 3},
    "roberta": _ENCODER | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "xlm-roberta": _ENCODER | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "albert": _ENCODER | {"embedding_size": 16, "bos_token_id": 1, "eos_token_id": 2},
    "electra": _ENCODER | {"embedding_size": 16},
    "modernbert": _ENCODER
    | {
        "num_hidden_layers": 4, "local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 3,
    },
    "openai-gpt": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24},
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 24,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 24, "attention_types": [[["global", "local", "local"], 1]], "window_size": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": _ENCODER | {"bos_token_id": 1, "eos_token_id": 2},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4, "head_dim": 6},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 6},
    "gemma": _LLAMA | {"head_dim": 6},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "bart": _BART | {"decoder_start_token_id": 2},
    "mbart": _BART,
    "marian": _BART | {"decoder_start_token_id": 0},
    "t5": {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3,
        "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "pad_token_id": 0,
        "eos_token_id": 2, "decoder_start_token_id": 0,
    },
    "xlnet": {
        "vocab_size": VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "mem_len": 12,
        "pad_token_id": 0,
    },
}  # fmt: skip
_CONFIGS = {
    "Bert": "bert", "Roberta": "roberta", "XLMRoberta": "xlm-roberta", "Albert": "albert", "Electra": "electra",
    "ModernBert": "modernbert", "OpenAIGPT": "openai-gpt", "GPT2": "gpt2", "GPTNeoX": "gpt_neox", "GPTNeo": "gpt_neo",
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma2": "gemma2",
    "Gemma3": "gemma3_text", "Gemma": "gemma", "Bart": "bart", "MBart": "mbart", "Marian": "marian", "T5": "t5",
    "XLNet": "xlnet",
}  # fmt: skip


def family_of(name: str) -> str:
    """The model_type of a Hugging Face class."""
    return next(family for prefix, family in _CONFIGS.items() if name.startswith(prefix))


def hf_model(name: str, seed: int = 0, **fields) -> transformers.PreTrainedModel:
    """A Hugging Face model by class name, in eval mode, float32, every parameter perturbed by 0.1 randn."""
    torch.manual_seed(seed)
    family = family_of(name)
    config = transformers.AutoConfig.for_model(family, **SHAPES[family] | fields)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # not Marian's sines and cosines
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def ours_of(model: transformers.PreTrainedModel, directory: Path, dtype: torch.dtype | None = None) -> Transformer:
    model.save_pretrained(directory)
    return Transformer.from_pretrained(directory, dtype=dtype)


def gradients_as_theirs(model: Transformer) -> dict[str, Tensor]:
    """Our gradients under Hugging Face's names and in its layout; a parameter without one counts as zeros."""
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return FAMILIES[model.config.family].write_tensors(named, model.config.to_dict())


def gradients_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Theirs, under the names of their files; tied parameters appear once."""
    family = model.config.model_type
    renamed = {"lm_head.weight": "embed_out.weight"} if family == "gpt_neox" else {}
    if model.config.tie_word_embeddings:
        shared = getattr(model.config, "share_encoder_decoder_embeddings", True)
        renamed |= FAMILIES[family].tied if shared else FAMILIES[family].tied_apart
    named = {renamed.get(n, n): p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}


def random_ids(*shape: int, seed: int = 0, low: int = 3) -> Tensor:
    return torch.randint(low, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(side: str, lengths: list[int], length: int) -> Tensor | None:
    """(batch, length) of 1 and 0, padded on that side."""
    if side == "none":
        return None
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if side == "left" else mask
