"""Transformer: language models of every family from one config."""

from __future__ import annotations

from llmengine.models.config import TransformerConfig
from llmengine.models.output import TransformerOutput
from llmengine.models.transformer import Transformer

__all__ = ["Transformer", "TransformerConfig", "TransformerOutput"]
