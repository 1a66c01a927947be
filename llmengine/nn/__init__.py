"""Public modules, named and shaped as in torch.nn, same state_dict keys: `from llmengine import nn` is the port.

FeedForward, Fp8Linear and keep_fp8_weights are ours. Everything else of torch.nn (Linear, Dropout, ...) is served from
torch.nn itself.
"""

from __future__ import annotations

import torch.nn as _torch_nn

from llmengine.nn.attention import MultiheadAttention
from llmengine.nn.embedding import Embedding
from llmengine.nn.feed_forward import FeedForward
from llmengine.nn.fp8_linear import Fp8Linear, keep_fp8_weights
from llmengine.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from llmengine.nn.norm import LayerNorm, RMSNorm
from llmengine.nn.stack import Transformer, TransformerDecoder, TransformerEncoder
from llmengine.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "CrossEntropyLoss",
    "Embedding",
    "FeedForward",
    "Fp8Linear",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "keep_fp8_weights",
]


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_torch_nn, name)
