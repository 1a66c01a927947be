"""llmengine: pretrain and fine-tune transformers at the speed of the hardware, on GPUs and CPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmengine import functional, nn, optim
    from llmengine.models import Transformer, TransformerConfig
    from llmengine.ops.registry import backend, explain

__version__ = "0.1.0"
__all__ = ["Transformer", "TransformerConfig", "__version__", "backend", "explain", "functional", "nn", "optim"]

_HOMES = {
    "Transformer": "llmengine.models",
    "TransformerConfig": "llmengine.models",
    "backend": "llmengine.ops.registry",
    "explain": "llmengine.ops.registry",
}


def __getattr__(name: str):
    # imported at first use: PyTorch is not needed to tell what the program can do, nor pydantic for the operators
    if name in ("functional", "nn", "optim"):
        return importlib.import_module(f"llmengine.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmengine' has no attribute {name!r}")
