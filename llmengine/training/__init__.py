"""Training: a run's config, the loop, checkpoints, the run folder."""

from __future__ import annotations

from llmengine.training.config import RunConfig

__all__ = ["RunConfig"]
