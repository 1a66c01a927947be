"""How well answers fit: scores with confidence intervals, from counts that each row contributes."""

from __future__ import annotations

from llmengine.metrics.score import Confusion, Judgement, Score, Table, interval

__all__ = ["Confusion", "Judgement", "Score", "Table", "interval"]
