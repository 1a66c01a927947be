"""The gradient of a word embedding that is the output layer's weight, too."""

from __future__ import annotations

import pytest
import torch

import llmengine
from llmengine import functional


@pytest.mark.parametrize("preset", ["gpt2", "bert-base", "t5-small"])
def test_it_is_gathered_as_autograd_would_add_it(preset, monkeypatch):
    sizes = {"n_layers": 1, "d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 48, "vocab_size": 60}
    names = ("dropout", "embed_dropout", "attention_dropout", "activation_dropout", "final_dropout")
    config = llmengine.TransformerConfig.preset(preset).replace(
        **sizes, **dict.fromkeys(names, 0.0), pad_token_id=1, bos_token_id=2, eos_token_id=2,
        decoder_start_token_id=2 if preset[0] == "t" else None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = llmengine.Transformer(config), torch.randint(3, 60, (2, 6))
    model.train()
    gathered: list[object] = []
    made = functional.TiedEmbedding
    monkeypatch.setattr(functional, "TiedEmbedding", lambda *args: gathered.append("") or made(*args))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert len(gathered) == 1
    model.words.register_forward_hook(lambda *_: None)  # a leaf that is watched is called
    expected = gradients()
    assert len(gathered) == 1 and found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
