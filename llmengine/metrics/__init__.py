"""How well answers fit: scores with confidence intervals, from counts that each row contributes."""

from __future__ import annotations

from llmengine.metrics.answers import answers
from llmengine.metrics.classes import classification, multi_label
from llmengine.metrics.perplexity import perplexity
from llmengine.metrics.regression import regression
from llmengine.metrics.score import Confusion, Judgement, Score, Table, bootstrap, interval, intervals
from llmengine.metrics.spans import spans, tags
from llmengine.metrics.texts import texts

__all__ = [
    "Confusion",
    "Judgement",
    "Score",
    "Table",
    "answers",
    "bootstrap",
    "classification",
    "interval",
    "intervals",
    "multi_label",
    "perplexity",
    "regression",
    "spans",
    "tags",
    "texts",
]
