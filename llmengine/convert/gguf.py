"""GGUF files of Llama models, as llama.cpp writes them; the package `gguf` reads the format and the quantised blocks.

What was quantised becomes float32 again: the model computes what the file says, not what was there before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmengine.convert.foreign import Foreign, renamed
from llmengine.convert.llama import LLAMA

MAGIC = b"GGUF"
# theirs, without "llama." -> Hugging Face's, whose names our table of Llama knows
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_CHECKED = {"rope.dimension_count", "attention.value_length"}  # must be the head's width
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)


def recognises(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path) -> Foreign:
    """ModuleNotFoundError without the package `gguf`; ValueError where the file holds another architecture, or fields
    that llmengine does not know."""
    try:
        from gguf import GGUFReader, dequantize
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} is a GGUF file; to read it: pip install gguf") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file that the package gguf reads: {error}") from None
    wanted = ("general.architecture", "llama.", *(f"tokenizer.ggml.{token}_token_id" for token in _TOKENS.values()))
    facts = {name: field.contents() for name, field in reader.fields.items() if name.startswith(wanted)}
    blocks = {
        block.name: torch.from_numpy(dequantize(block.data, block.tensor_type).copy()) for block in reader.tensors
    }
    tensors = renamed(blocks, _NAMES, "$^")
    config = _config(path, facts, tensors)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        if found := re.search(r"\.self_attn\.([qk])_proj\.", name):
            tensors[name] = _halves(tensor, heads[found[1]])
    return Foreign(LLAMA, LLAMA.read_config(config, tensors), tensors)


def _config(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """As Hugging Face's config.json would say it."""
    architecture = facts.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r}; of GGUF files, llmengine reads those of 'llama'")
    fields = {name.removeprefix("llama."): value for name, value in facts.items() if name.startswith("llama.")}
    if unknown := sorted(fields.keys() - _FIELDS.keys() - _CHECKED):
        raise ValueError(f"{path}: fields unknown to llmengine: llama.{', llama.'.join(unknown)}")
    config = {theirs: fields[name] for name, theirs in _FIELDS.items() if name in fields}
    heads = config["num_attention_heads"]
    width = config.setdefault("head_dim", config["hidden_size"] // heads)
    for name in _CHECKED & fields.keys():
        if fields[name] != width:
            raise ValueError(f"{path}: llama.{name} is {fields[name]}; llmengine computes the head's width, {width}")
    tokens = {ours: facts.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in _TOKENS.items()}
    return (
        config
        | tokens
        | {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(tensors["model.embed_tokens.weight"]),
            "num_key_value_heads": config.get("num_key_value_heads", heads),
            "rms_norm_eps": float(f"{config['rms_norm_eps']:.6g}"),  # stored as float32: 1e-05 is 9.99999975e-06 there
            "tie_word_embeddings": "lm_head.weight" not in tensors,
        }
    )


def _halves(weight: Tensor, heads: int) -> Tensor:
    """The pairs of features that turn together are neighbours in theirs and half a head apart in ours."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
