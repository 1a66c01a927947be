"""LoRA (Hu et al. 2021) of the package peft on our models, which know nothing of it; collected where it is there."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.testing import assert_near

SMALL = {"vocab_size": 61, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 24, "max_positions": 20, "dropout": 0.0,
         "embed_dropout": 0.0, "attention_dropout": 0.0}  # fmt: skip
PRESETS = ("bert-tiny", "gpt-tiny", "llama-tiny", "bart-tiny")
LEAVES = ["qkv", "out", "up", "down"]


def base(preset: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset(preset, **SMALL))
    with torch.no_grad():  # as of a trained model, whose layers matter
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def adapted(preset: str, **options) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(base(preset), peft.LoraConfig(r=4, target_modules=LEAVES, **options))


def batch(seed: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def train(model: torch.nn.Module, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        given = batch(seed=3)
        return model(**given).logits


@pytest.mark.parametrize("preset", PRESETS)
def test_lora_begins_as_the_model_itself(preset):
    assert_near(logits(adapted(preset)), logits(base(preset)), 1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_lora_trains_its_own_weights_only(preset):
    model = adapted(preset).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    sides = {"bert-tiny": 1, "gpt-tiny": 1, "llama-tiny": 1, "bart-tiny": 2}[preset]
    cross = 2 if sides == 2 else 0  # the cross-attention's `out`, in 2 layers
    assert sum("lora_A" in name for name in trained) == sides * 2 * len(LEAVES) + cross
    losses = train(model)
    assert losses[-1] < 0.95 * losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trained), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_is_the_same_model_without_peft(preset, options, tmp_path):
    model = adapted(preset, **options).train()
    train(model, steps=4)
    expected = logits(model)
    assert not torch.allclose(expected, logits(base(preset)), atol=1e-3)
    merged = model.merge_and_unload()
    assert type(merged) is Transformer and merged.state_dict().keys() == base(preset).state_dict().keys()
    assert_near(logits(merged), expected, 1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path)), logits(merged))
    assert "leaf by leaf" not in merged.explain(), "the fused operators run again"


@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_are_saved_and_loaded(preset, tmp_path):
    model = adapted(preset).train()
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(preset), tmp_path)
    assert torch.equal(logits(again), logits(model))
    state = peft.get_peft_model_state_dict(model)
    third = adapted(preset)
    report = peft.set_peft_model_state_dict(third, state)
    assert not report.unexpected_keys
    assert torch.equal(logits(third), logits(model))


def test_a_disabled_adapter_leaves_the_model_as_it_was():
    model = adapted("gpt-tiny").train()
    train(model, steps=3)
    changed = logits(model)
    with model.disable_adapter():
        assert_near(logits(model), logits(base("gpt-tiny")), 1e-6)
    assert torch.equal(logits(model), changed)
