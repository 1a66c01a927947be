"""llmengine: pretrain and fine-tune transformers at the speed of the hardware, on GPUs and CPUs."""

from __future__ import annotations

from llmengine import functional
from llmengine.ops.registry import backend, explain

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "explain", "functional"]
