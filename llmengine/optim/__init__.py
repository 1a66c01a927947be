"""Optimizers: `AdamW`, in the place of torch.optim's."""

from __future__ import annotations

from llmengine.optim.adamw import AdamW

__all__ = ["AdamW"]
