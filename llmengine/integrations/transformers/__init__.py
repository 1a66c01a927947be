"""Hugging Face Transformers' models on llmengine's kernels.

register() makes attn_implementation="llmengine" known, wherever Transformers takes that argument, and our own models to
the auto classes. accelerate(model)
puts in that attention, our norms, feed-forward blocks and the loss of the language-modelling head; explain(model) tells
what was swapped, what was left and why; restore(model) undoes it.
"""

from __future__ import annotations

from llmengine.integrations.transformers.auto import register
from llmengine.integrations.transformers.swap import accelerate, explain, restore

__all__ = ["accelerate", "explain", "register", "restore"]
