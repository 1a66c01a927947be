"""Linear layer, written out from its formulas (csrc/ops/linear.h)."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import added
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


@kernel(KERNELS, "linear_forward")
def linear_forward(input, weight, bias):
    return torch.nn.functional.linear(_wide(input), _wide(weight), _wide(bias)).to(input.dtype)


@kernel(KERNELS, "linear_backward")
def linear_backward(grad_output, input, weight, main, wanted):
    grad, x = _wide(grad_output), _wide(input)
    gradients = (
        lambda: (grad @ _wide(weight)).to(input.dtype),
        lambda: added(grad.T @ x, main).to(weight.dtype),
        lambda: grad.sum(0),
    )
    dtypes = (input, weight, grad)
    return tuple(g() if want else like.new_empty(0) for g, like, want in zip(gradients, dtypes, wanted, strict=True))
