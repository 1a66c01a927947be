"""GGUF files of small Llamas, written by the package `gguf`. Collected where it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from llmengine import Transformer
from llmengine.testing import assert_near

from .peers import hf_model, random_ids

IDS = random_ids(2, 9)
NAMES = (
    (r"^model\.embed_tokens", "token_embd"),
    (r"^model\.norm", "output_norm"),
    (r"^lm_head", "output"),
    (r"^model\.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"self_attn\.(.)_proj", r"attn_\1"),
    (r"mlp\.(\w+)_proj", r"ffn_\1"),
)


def write(path: Path, theirs: transformers.LlamaForCausalLM, architecture: str = "llama", **facts: str) -> None:
    """As llama.cpp's converter does it: two features that turn together become neighbours."""
    config = theirs.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_eos_token_id(2)
    for name, value in facts.items():
        writer.add_string(f"llama.{name}", value)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if found := re.search(r"\.([qk])_proj\.", name):
            heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_llama(tied, tmp_path):
    theirs = hf_model("LlamaForCausalLM", tie_word_embeddings=tied, rms_norm_eps=1e-5)
    write(tmp_path / "x.gguf", theirs)
    ours = Transformer.from_pretrained(tmp_path / "x.gguf")
    assert_near(ours(IDS).logits, theirs(IDS).logits, 1e-5)
    assert ours.config.tie_embeddings == tied and ours.config.norm_eps == 1e-5
    assert (ours.config.pad_token_id, ours.config.bos_token_id, ours.config.eos_token_id) == (None, None, 2)
    ours.save_pretrained(tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_is_refused(tmp_path):
    theirs = hf_model("LlamaForCausalLM", num_hidden_layers=1)
    write(tmp_path / "a.gguf", theirs, architecture="qwen2")
    with pytest.raises(ValueError, match=r"a\.gguf: architecture 'qwen2'; of GGUF files, llmengine reads"):
        Transformer.from_pretrained(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", theirs, **{"rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match=r"fields unknown to llmengine: llama\.rope\.scaling\.type"):
        Transformer.from_pretrained(tmp_path / "b.gguf")
    wide = hf_model("LlamaForCausalLM", num_hidden_layers=1, head_dim=6)
    write(tmp_path / "c.gguf", wide)
    with pytest.raises(ValueError, match=r"llama\.rope\.dimension_count is 6; llmengine computes the head's width, 8"):
        Transformer.from_pretrained(tmp_path / "c.gguf")
