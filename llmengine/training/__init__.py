"""Training: a run's config, the loop, checkpoints, the run folder."""

from __future__ import annotations

from llmengine.training.config import RunConfig
from llmengine.training.loop import Diverged, Result, train
from llmengine.training.observer import Observer

__all__ = ["Diverged", "Observer", "Result", "RunConfig", "train"]
