"""Embedding: rows of a table by token id."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine.functional.arguments import check_float, check_same_device, check_tensor, flat, needs_grad, short
from llmengine.ops import embedding as ops

INDICES = (torch.int64, torch.int32)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    scale: float = 1.0,
) -> Tensor:
    """scale weight[input], as `torch.nn.functional.embedding`; the gradient is the same on every run.

    Shapes: input, of ids, any; weight (V, D); the result (*input.shape, D) in weight's dtype. padding_idx: the row that
    gets no gradient, counted from the end where negative. The product with `scale` (sqrt(D) in Vaswani et al. 2017) is
    rounded once. Gradients of an id's tokens are added in float32 and rounded once (PyTorch: in weight's dtype).

    max_norm, scale_grad_by_freq and sparse are not supported and must have their defaults. Raises ValueError for them,
    for shapes, dtypes and devices that do not fit, and on the CPU for an id outside [0, V); on a GPU, which is not
    waited for, the result of such an id is NaN.
    """
    op = "embedding"
    check_tensor(op, "input", input)
    if input.dtype not in INDICES:
        raise ValueError(f"{op}: input has dtype {short(input.dtype)}; allowed: {', '.join(map(short, INDICES))}")
    check_float(op, "weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (V, D)")
    check_same_device(op, input=input, weight=weight)
    if max_norm is not None or scale_grad_by_freq or sparse:
        name = "max_norm" if max_norm is not None else "scale_grad_by_freq" if scale_grad_by_freq else "sparse"
        raise ValueError(f"{op}: {name} is not supported; use torch.nn.functional.embedding")
    rows, columns = weight.shape
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx is {padding_idx}; allowed: {-rows} to {rows - 1}, or None")
    if not abs(scale) < math.inf:  # see cross_entropy.check_options
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    ids = flat(input if input.dtype == torch.int64 else input.to(torch.int64))
    if needs_grad(weight):
        padding = -1 if padding_idx is None else padding_idx % rows
        output = ops.Embedding.apply(ids, weight, padding, float(scale))
    else:
        output = ops.embedding_forward(ids, weight, float(scale))
    return output if input.ndim == 1 else output.view(*input.shape, columns)


class TiedEmbedding:
    """A word embedding for one pass through a model whose output layer has the same weight: `words(ids)` looks rows up,
    `words.weight` is what the output layer is to take.

    Both give a part of the weight's gradient. Autograd by itself makes a tensor of the weight's size for each and adds
    them; here the rows that were looked up are added into the output layer's. Either part may be missing.
    """

    def __init__(self, weight: Tensor, padding_idx: int | None = None) -> None:
        self._padding_idx = padding_idx
        self._lookups: list[tuple[Tensor, Tensor]] = []
        self.weight: Tensor = ops.TiedWeight.apply(weight, self._lookups)

    def __call__(self, ids: Tensor) -> Tensor:
        return ops.TiedLookup.apply(self.weight, ids, self._padding_idx, self._lookups)
