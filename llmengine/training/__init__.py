"""Training: a run's config, the loop, checkpoints, the run folder."""

from __future__ import annotations

from llmengine.training.config import RunConfig
from llmengine.training.finetune_config import FinetuneConfig
from llmengine.training.loop import Diverged, Result, train
from llmengine.training.observer import Observer
from llmengine.training.progress import ProgressLine

__all__ = ["Diverged", "FinetuneConfig", "Observer", "ProgressLine", "Result", "RunConfig", "train"]
