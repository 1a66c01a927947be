"""Models whose layers' projections multiply in 8-bit floats: which leaves they are, that files hold what they held, and
that training goes as it does without.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import llmengine
from llmengine import nn

SCALINGS = pytest.mark.parametrize("scaling", ["tensor", "block"])
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64, "vocab_size": 40, "max_positions": 32}


def model_of(preset: str, scaling: str | None, **changes) -> llmengine.Transformer:
    torch.manual_seed(3)
    config = llmengine.TransformerConfig.preset(preset).replace(
        **SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2, fp8=scaling, **changes
    )
    return llmengine.Transformer(config)


@pytest.mark.parametrize("preset, each", [("gpt2", 4), ("xlnet-base", 5)])
def test_the_projections_of_layers_and_nothing_else(preset: str, each: int):
    changes = {"max_positions": None} if preset == "xlnet-base" else {}
    torch.manual_seed(3)
    config = llmengine.TransformerConfig.preset(preset).replace(
        **SIZES | changes, pad_token_id=1, bos_token_id=0, eos_token_id=2, fp8="block"
    )
    model = llmengine.Transformer(config)
    leaves = {name: leaf for name, leaf in model.named_modules() if type(leaf) is nn.Fp8Linear}
    assert len(leaves) == each * config.n_layers
    assert all(".layers." in name and leaf.scaling == "block" for name, leaf in leaves.items())
    ids = torch.arange(3, 15).view(2, 6)
    assert model(ids, labels=ids).loss.isfinite()


@SCALINGS
def test_logits_are_near_and_parameters_the_same(scaling: str, tmp_path: Path):
    plain, rounded = model_of("gpt2", None).eval(), model_of("gpt2", scaling).eval()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), rounded.parameters(), strict=True))
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    expected, found = plain(ids).logits, rounded(ids).logits
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 0.001 < error < 0.05
    rounded.save_pretrained(tmp_path)
    again = llmengine.Transformer.from_pretrained(tmp_path, fp8=scaling)
    assert again.config.fp8 == scaling and torch.equal(again.eval()(ids).logits, found)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), rounded.parameters(), strict=True))


def trained(scaling: str | None) -> list[float]:
    """Losses of a decoder that learns to count on, by its token and where it stands."""
    model = model_of("gpt2", scaling, dropout=0.0, embed_dropout=0.0, attention_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    generator, losses = torch.Generator().manual_seed(5), []
    for _ in range(40):
        first, step = torch.randint(0, 37, (2, 8, 1), generator=generator)
        ids = 3 + (first + (1 + step % 2) * torch.arange(12)) % 37
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_goes_as_without():
    plain = trained(None)
    assert plain[0] > 3.3 and sum(plain[-5:]) / 5 < 1.2
    for scaling in ("tensor", "block"):
        losses = trained(scaling)
        assert abs(losses[0] - plain[0]) < 0.02
        assert abs(sum(losses[-5:]) - sum(plain[-5:])) / 5 < 0.1, scaling


def test_another_scaling_is_an_error():
    with pytest.raises((ValueError, ValidationError), match="fp8"):
        model_of("gpt2", "row")
