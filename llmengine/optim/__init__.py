"""Optimizers: `AdamW`, in the place of torch.optim's; the norm by which gradients are clipped; float32 gradients."""

from __future__ import annotations

from llmengine.optim.adamw import AdamW
from llmengine.optim.gradient_norm import gradient_norm
from llmengine.optim.main_grad import MainGradients

__all__ = ["AdamW", "MainGradients", "gradient_norm"]
