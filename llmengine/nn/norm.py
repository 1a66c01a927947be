"""LayerNorm and RMSNorm: torch.nn's modules on our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine import functional


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, computed by `llmengine.functional.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, computed by `llmengine.functional.rms_norm`."""

    def gain(self) -> Tensor | None:
        """What the normalised features are multiplied by."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.gain(), self.eps)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + weight, as Gemma's; the sum is float32 whatever the weight's dtype."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def gain(self) -> Tensor:
        return 1.0 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
