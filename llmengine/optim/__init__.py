"""Optimizers: `AdamW`, in the place of torch.optim's, and the norm by which gradients are clipped."""

from __future__ import annotations

from llmengine.optim.adamw import AdamW
from llmengine.optim.gradient_norm import gradient_norm

__all__ = ["AdamW", "gradient_norm"]
