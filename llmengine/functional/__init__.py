"""Public operators, named and shaped as in torch.nn.functional; everything more is keyword-only."""

from __future__ import annotations

from llmengine.functional.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
