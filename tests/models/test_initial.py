"""Initial weights: init "neighbours" gives heads that look a fixed number of places away."""

from __future__ import annotations

import pytest
import torch

from llmengine import Transformer, TransformerConfig

LENGTH = 96


def attention(model: Transformer, layer: int = 0) -> torch.Tensor:
    """Probabilities (heads, length, length) of a layer that reads the embeddings of random tokens."""
    config = model.config
    ids = torch.randint(5, config.vocab_size, (LENGTH,))
    ids[::5] = 4  # as many equal tokens as a masked sequence has: heads must not look from mask to mask
    x = model.stack.embeddings(ids, torch.arange(LENGTH), torch.zeros_like(ids) if config.type_vocab_size else None)
    block = model.stack.layers[layer]
    x = block.attention_norm(x) if block.place == "pre" else x
    q, k, _ = block.attention.qkv(x).view(LENGTH, 3, config.n_heads, config.head_dim).permute(1, 2, 0, 3)
    scores = q @ k.mT / config.head_dim**0.5
    if config.causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "preset, heads, offsets",
    [
        ("bert-tiny", 2, [-1, 1]),
        ("bert-small", 8, [-1, 1, -2, 2, -3, 3, -4, 4]),
        ("gpt-tiny", 2, [-1, -2]),
        ("gpt-small", 8, [-1, -2, -3, -4, -1, -2, -3, -4]),
    ],
)
@torch.no_grad()
def test_heads_look_at_neighbours(preset: str, heads: int, offsets: list[int]):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset(preset, init="neighbours", vocab_size=300, embed_dropout=0.0))
    probabilities = attention(model)
    assert probabilities.shape[0] == heads
    for head, wanted in enumerate(offsets):
        means = {o: probabilities[head].diagonal(o).mean().item() for o in range(-8, 1 if model.config.causal else 9)}
        assert max(means, key=means.__getitem__) == wanted, f"head {head}: {means}"
        assert means[wanted] > 10 * max(mean for o, mean in means.items() if o != wanted), f"head {head}: {means}"


@torch.no_grad()
def test_other_weights_are_normal_and_the_default_looks_nowhere():
    torch.manual_seed(0)
    config = TransformerConfig.preset("bert-tiny", vocab_size=300, embed_dropout=0.0)
    model = Transformer(config.replace(init="neighbours", init_std=0.05))
    query, key, value = model.stack.layers[1].attention.qkv.weight.chunk(3)
    for weight in (value, model.stack.layers[0].feed_forward.up.weight, model.words.weight[1:]):
        assert abs(weight.std().item() / 0.05 - 1) < 0.05 and abs(weight.mean().item()) < 0.005
    assert abs(model.stack.embeddings.position.weight.std().item() / 0.05 - 1) < 0.05
    assert not model.words.weight[0].any() and not model.stack.layers[0].attention.qkv.bias.any()
    for head in (key[:64], key[64:], query[:64]):  # rows of a scaled orthonormal matrix
        gram = head @ head.T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(64), atol=1e-4)
    plain = attention(Transformer(config))
    assert plain.max() < 3 / LENGTH


def test_it_is_a_function_of_the_seed_and_of_any_dtype():
    config = TransformerConfig.preset("bert-tiny", vocab_size=300, init="neighbours")
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(Transformer(config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    half = Transformer(config, dtype=torch.bfloat16)
    assert half.stack.layers[0].attention.qkv.weight.dtype == torch.bfloat16
    assert half.stack.layers[0].attention.qkv.weight.isfinite().all()
    odd = Transformer(config.replace(d_model=15, n_heads=3))  # an odd width leaves one column of positions normal
    assert (
        odd.stack.embeddings.position.weight.isfinite().all() and odd.stack.embeddings.position.weight[:, -1].std() > 0
    )
