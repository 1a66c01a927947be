"""llmengine: pretrain and fine-tune transformers at the speed of the hardware, on GPUs and CPUs."""

from __future__ import annotations

from llmengine import functional, nn
from llmengine.ops.registry import backend, explain

__version__ = "0.1.0"
__all__ = ["Transformer", "TransformerConfig", "__version__", "backend", "explain", "functional", "nn"]


def __getattr__(name: str):
    # imported at first use: pydantic and safetensors are not needed by those who want the operators only
    if name in ("Transformer", "TransformerConfig"):
        from llmengine import models

        return getattr(models, name)
    raise AttributeError(f"module 'llmengine' has no attribute {name!r}")
