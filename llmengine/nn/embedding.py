"""Embedding: torch.nn's module on our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine import functional


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding, computed by `llmengine.functional.embedding`, which refuses what it does not support:
    max_norm, scale_grad_by_freq and sparse."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
