"""Our Transformer inside a LightningModule, unmodified: PyTorch Lightning's Trainer beside a plain loop."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llmengine import Transformer, TransformerConfig

VOCABULARY, LENGTH, STEPS = 61, 12, 6
SHAPE = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "max_positions": LENGTH}
PRESETS = {"bert-base": "mlm", "gpt2": "clm", "bart-base": "seq2seq"}
every_preset = pytest.mark.parametrize("preset", PRESETS)


def tiny(preset: str) -> Transformer:
    torch.manual_seed(0)
    rates = dict.fromkeys(("dropout", "embed_dropout", "attention_dropout"), 0.0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokens |= {"decoder_start_token_id": 2} if preset == "bart-base" else {}
    return Transformer(TransformerConfig.preset(preset, objectives=[PRESETS[preset]], **SHAPE, **rates, **tokens))


def rows() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, LENGTH), generator=g)
    mask = (torch.arange(LENGTH) < torch.randint(5, LENGTH + 1, (8, 1), generator=g)).long()
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


class Module(lightning.LightningModule):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        assert not self.model.training
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(model: Transformer, directory: Path, steps: int = STEPS, resume: Path | None = None, **options) -> tuple:
    """The module and the trainer after it."""
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=directory, enable_checkpointing=False, **options,
    )  # fmt: skip
    module, data = Module(model), DataLoader(rows(), batch_size=4)
    trainer.fit(module, data, DataLoader(rows(), batch_size=8), ckpt_path=resume)
    return module, trainer


def weights(model: Transformer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@every_preset
def test_trains_as_a_plain_loop(preset, tmp_path):
    model, expected = tiny(preset), tiny(preset).train()
    module, trainer = fit(model, tmp_path)
    optimizer, losses = torch.optim.AdamW(expected.parameters(), lr=1e-2), []
    for step in range(STEPS):
        batch = next(iter(DataLoader(rows()[4 * (step % 2) :], batch_size=4)))
        loss = expected(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert module.losses == pytest.approx(losses, rel=1e-5) and losses[-1] < losses[0]
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-5)
    whole = next(iter(DataLoader(rows(), batch_size=8)))
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(expected.eval()(**whole).loss.item(), rel=1e-4)


@every_preset
def test_goes_on_from_its_checkpoint(preset, tmp_path):
    whole, half = tiny(preset), tiny(preset)
    fit(whole, tmp_path, steps=4)
    _, trainer = fit(half, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = tiny(preset)
    fit(resumed, tmp_path, steps=4, resume=tmp_path / "half.ckpt")
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)
    assert not torch.equal(weights(resumed), weights(half))


def test_accumulates_and_runs_in_mixed_precision(tmp_path):
    model = tiny("gpt2")
    module, _ = fit(model, tmp_path, steps=10, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert len(module.losses) == 20 and module.losses[-1] < 0.9 * module.losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
