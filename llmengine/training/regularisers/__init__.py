"""Regularisers of fine-tuning, one a file. Each is off unless a config asks for it, and costs nothing then."""

from __future__ import annotations

from llmengine.training.regularisers.ema import Ema
from llmengine.training.regularisers.fgm import Fgm
from llmengine.training.regularisers.neftune import Neftune
from llmengine.training.regularisers.r_drop import RDrop

__all__ = ["Ema", "Fgm", "Neftune", "RDrop"]
