"""Tiny models, and a plain training of them."""

from __future__ import annotations

from typing import Any

import torch

from llmengine import Transformer, TransformerConfig
from llmengine.data import Examples, StepBatches, Tokenizer
from llmengine.tasks import Task

QUIET = {"dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "max_positions": 128, "init_std": 0.1, **QUIET}
ENCODER = {"architecture": "encoder", "type_vocab_size": 2, **SHAPE}
DECODER = {"architecture": "decoder", "summary": "last", **SHAPE}
BOTH = {"architecture": "encoder_decoder", "summary": "last", **SHAPE}
XLNET = {
    "architecture": "encoder", "positions": "relative", "norm_place": "post", "final_norm": False, "summary": "last",
    **SHAPE,
}  # fmt: skip


def model_of(task: Task, tokenizer: Tokenizer, shape: dict[str, Any] = ENCODER, **fields: Any) -> Transformer:
    torch.manual_seed(0)
    special = {"vocab_size": tokenizer.vocab_size, "objectives": [task.objective], **task.model_fields()}
    return Transformer(TransformerConfig.from_dict({**shape, **special, **fields}))


def train(
    model: Transformer, examples: Examples, steps: int, lr: float = 3e-3, batch_tokens: int = 1024
) -> list[float]:
    """The losses of as many steps."""
    batches = StepBatches(examples, batch_tokens=batch_tokens, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for i in range(steps):
        step = batches[i]
        for micro_batch in step.micro_batches:
            loss = model(**micro_batch, num_items_in_batch=step.items).loss
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def gradients(model: Transformer, examples: Examples, batch_tokens: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Of one step over all examples, cut into `accumulation` micro-batches."""
    batches = StepBatches(examples, batch_tokens=batch_tokens, accumulation=accumulation, seed=0)
    assert batches.steps_per_epoch == 1
    step = batches[0]
    assert len(step.micro_batches) == accumulation
    model.zero_grad()
    for micro_batch in step.micro_batches:
        model(**micro_batch, num_items_in_batch=step.items).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_cut_is_no_matter(model: Transformer, examples: Examples) -> None:
    """The gradients of a step are the same whole and in four micro-batches."""
    total, longest = int(examples.lengths(0).sum()), int(examples.lengths(0).max())
    whole, cut = gradients(model, examples, total, 1), gradients(model, examples, -(-total // 4) + longest, 4)
    assert whole.keys() == cut.keys() and any(bool(g.any()) for g in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
