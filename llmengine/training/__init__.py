"""Training: a run's config, the loop, checkpoints, the run folder."""

from __future__ import annotations

from llmengine.training.config import RunConfig
from llmengine.training.loop import Diverged, Result, train
from llmengine.training.observer import Observer
from llmengine.training.progress import ProgressLine

__all__ = ["Diverged", "Observer", "ProgressLine", "Result", "RunConfig", "train"]
