"""Cross-entropy losses, of logits and of a linear layer's input (the logits are then never held)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine import functional
from llmengine.functional.cross_entropy import check_options


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on our kernels, for class indices.

    Where no label counts, "mean" gives 0 with zero gradients, not NaN.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        check_options("CrossEntropyLoss", reduction, label_smoothing, 0.0, 0.0)
        if weight is not None and weight.dim() != 1:
            raise ValueError(f"CrossEntropyLoss: weight has shape {tuple(weight.shape)}; expected (classes,)")
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """torch.nn.LinearCrossEntropyLoss for class indices: cross_entropy(linear(input), target).

    The (tokens, num_classes) logits are not held, unless on GPUs the attribute `recompute`, which may be set at any
    time, is False: then up to 2 GiB of them, for speed (`functional.linear_cross_entropy`). input (N, in_features) or
    (in_features,), target (N,) or (). `options` (PyTorch's choice of chunks) is accepted and has no effect;
    out_features and class probabilities are not supported.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
    ) -> None:
        super().__init__()
        if math.prod(out_features) != 1:
            raise ValueError(
                f"LinearCrossEntropyLoss: out_features {tuple(out_features)} is not supported; allowed: ()"
            )
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(
                f"LinearCrossEntropyLoss: weight has shape {tuple(weight.shape)}; expected {(num_classes,)}"
            )
        check_options("LinearCrossEntropyLoss", reduction, label_smoothing, 0.0, 0.0)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.recompute = True
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            raise ValueError("LinearCrossEntropyLoss: target holds class probabilities; class indices are supported")
        shape = (*input.shape[:-1], *self.out_features)
        if tuple(target.shape) != shape:
            raise ValueError(f"LinearCrossEntropyLoss: target has shape {tuple(target.shape)}; expected {shape}")
        loss = functional.linear_cross_entropy(
            input.reshape(-1, input.shape[-1]),
            self.linear.weight,
            target.reshape(-1),
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
            recompute=self.recompute,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
