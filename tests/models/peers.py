"""Tiny Hugging Face models as oracles, their weights perturbed so that zero biases and unit norms hide nothing."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from llmengine import Transformer
from llmengine.convert import FAMILIES

VOCABULARY = 61
SHAPES = {
    "bert": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 24, "type_vocab_size": 3,
    },
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 24,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def hf_model(name: str, seed: int = 0, **fields) -> transformers.PreTrainedModel:
    """A Hugging Face model by class name, in eval mode, float32, every parameter perturbed by 0.1 randn."""
    torch.manual_seed(seed)
    family = "bert" if name.startswith("Bert") else "gpt2"
    config = {"bert": transformers.BertConfig, "gpt2": transformers.GPT2Config}[family](**SHAPES[family] | fields)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ours_of(model: transformers.PreTrainedModel, directory: Path, dtype: torch.dtype | None = None) -> Transformer:
    model.save_pretrained(directory)
    return Transformer.from_pretrained(directory, dtype=dtype)


def gradients_as_theirs(model: Transformer) -> dict[str, Tensor]:
    """Our gradients under Hugging Face's names and in its layout; a parameter without one counts as zeros."""
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return FAMILIES[model.config.family].write_tensors(named, model.config.n_layers)


def gradients_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Theirs; tied parameters appear once."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def random_ids(*shape: int, seed: int = 0, low: int = 3) -> Tensor:
    return torch.randint(low, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(side: str, lengths: list[int], length: int) -> Tensor | None:
    """(batch, length) of 1 and 0, padded on that side."""
    if side == "none":
        return None
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if side == "left" else mask
