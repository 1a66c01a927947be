"""Hugging Face's Trainer drives our models: losses fall, accumulation changes nothing, checkpoints resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from llmengine import Transformer
from llmengine.models import TransformerConfig

from .peers import VOCABULARY, random_ids

LENGTH, EXAMPLES = 16, 8
OBJECTIVES = {"bert-base": ("mlm",), "gpt2": ("clm",)}
both = pytest.mark.parametrize("preset", OBJECTIVES)


def tiny(preset: str, objectives: tuple[str, ...] | None = None, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "max_positions": LENGTH}
    rates = {name: dropout for name in ("dropout", "embed_dropout", "attention_dropout")}
    objectives = objectives or OBJECTIVES[preset]
    family = {"bos_token_id": None, "eos_token_id": None} if preset == "gpt2" else {}
    return Transformer(TransformerConfig.preset(preset, objectives=objectives, **shape, **rates, **family))


def examples(model: Transformer) -> list[dict[str, Tensor]]:
    """Rows of unequal length, and so of unequally many labels: a mean of means is not the mean."""
    ids = random_ids(EXAMPLES, LENGTH)
    g = torch.Generator().manual_seed(1)
    real = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (EXAMPLES, 1), generator=g)
    labelled = real if model.config.causal else real & (torch.rand(ids.shape, generator=g) < 0.4)
    labels = torch.where(labelled, ids, -100)
    return [
        {"input_ids": i, "attention_mask": r.long(), "labels": t} for i, r, t in zip(ids, real, labels, strict=True)
    ]


def trainer(model: Transformer, directory: Path, data: list | None = None, **options) -> Trainer:
    options = {"per_device_train_batch_size": EXAMPLES, "learning_rate": 1e-2, "save_strategy": "no"} | options
    arguments = TrainingArguments(
        output_dir=str(directory), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        label_names=["labels"], **options,
    )  # fmt: skip
    data = data or examples(model)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def weights(model: Transformer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@both
def test_the_loss_falls(preset, tmp_path):
    run = trainer(tiny(preset), tmp_path, max_steps=30, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    before = run.evaluate()["eval_loss"]
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 30 and losses[0] == pytest.approx(before, rel=1e-4)
    assert losses[-1] < 0.5 * losses[0] and run.evaluate()["eval_loss"] < 0.5 * before


@both
def test_accumulation_changes_nothing(preset, tmp_path):
    """One step of plain gradient descent on the same eight examples, cut differently."""
    options = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    start, ends = weights(tiny(preset)), {}
    for batch, accumulated in ((8, 1), (4, 2), (1, 8)):
        model = tiny(preset)
        run = trainer(
            model, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, **options
        )
        run.train()
        ends[batch] = weights(model)
    assert (ends[8] - start).abs().max() > 1e-4
    for end in ends.values():
        torch.testing.assert_close(end, ends[8], rtol=0, atol=1e-6)

    expected = tiny(preset)
    batch = {name: torch.stack([row[name] for row in examples(expected)]) for name in ("input_ids", "attention_mask")}
    labels = torch.stack([row["labels"] for row in examples(expected)])
    expected(**batch, labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    torch.testing.assert_close(ends[1], weights(expected), rtol=0, atol=1e-6)


@both
def test_saves_and_resumes(preset, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = tiny(preset, dropout=0.1)
    trainer(whole, tmp_path, **options).train()

    halfway = tmp_path / "checkpoint-2"
    assert load_file(halfway / "model.safetensors").keys() == whole.state_dict().keys()
    resumed = tiny(preset, dropout=0.1)
    trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(halfway))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)

    whole.save_pretrained(tmp_path / "saved")
    loaded, ids = Transformer.from_pretrained(tmp_path / "saved"), random_ids(2, LENGTH)
    assert torch.equal(loaded(ids).logits, whole.eval()(ids).logits)


def test_sentence_pairs_train_too(tmp_path):
    """Two losses that count different things: Trainer then takes the mean over the accumulated batches."""
    model = tiny("bert-base", ("mlm", "nsp"))
    pairs = torch.arange(EXAMPLES) % 2
    data = [row | {"next_sentence_label": pair} for row, pair in zip(examples(model), pairs, strict=True)]
    run = trainer(model, tmp_path, data, max_steps=30, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_the_config_stays_frozen():
    """Trainer sets use_cache in every config, and loggers ask for JSON."""
    config = tiny("gpt2").config
    config.use_cache = False
    assert config.use_cache is False and "use_cache" not in config.to_dict()
    for name, value in (("use_cache", True), ("d_model", 64)):
        with pytest.raises((ValueError, AttributeError), match=name):
            setattr(config, name, value)
    assert TransformerConfig.from_dict(json.loads(config.to_json_string())) == config
