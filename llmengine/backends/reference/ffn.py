"""Feed-forward block, written out from its formulas (csrc/ops/ffn.h)."""

from __future__ import annotations

import math

import torch

from llmengine.backends.buffers import added
from llmengine.backends.reference.philox import keep_multiplier
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


def _linear(x, weight, bias):
    return torch.nn.functional.linear(x, _wide(weight).to(x.dtype), None if bias is None else _wide(bias).to(x.dtype))


def _gelu(x):
    cdf = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x):
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _relu_squared(x):
    positive = x.clamp_min(0)
    return positive * positive, 2 * positive


def _silu(x):
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


# value and derivative
ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: (x.clamp_min(0), (x > 0).to(x.dtype)),
    "relu_squared": _relu_squared,
    "silu": _silu,
}


def _keep(h, seed, p):
    return keep_multiplier(seed, p, 0, torch.arange(h.shape[0], device=h.device), h.shape[1], h.dtype)


def _pre_activations(input, w_up, b_up, w_gate, b_gate):
    x = _wide(input)
    return _linear(x, w_up, b_up), None if w_gate is None else _linear(x, w_gate, b_gate)


@kernel(KERNELS, "ffn_forward")
def ffn_forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, save):
    act = ACTIVATIONS[activation]
    up, gate = _pre_activations(input, w_up, b_up, w_gate, b_gate)
    hidden = act(up)[0] if gate is None else act(gate)[0] * up
    if dropout_p > 0:
        hidden = hidden * _keep(hidden, seed, dropout_p)
    output = _linear(hidden, w_down, b_down)
    if residual is not None:
        output = output + _wide(residual)
    nothing = input.new_empty(0)
    return (
        output.to(input.dtype),
        up.to(input.dtype) if save else nothing,
        gate.to(input.dtype) if save and gate is not None else nothing.clone(),
    )


@kernel(KERNELS, "ffn_backward")
def ffn_backward(
    grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed, activation, dropout_p, main_up, main_gate,
    main_down, wanted,
):  # fmt: skip
    act = ACTIVATIONS[activation]
    if up is None:
        up, gate = (h if h is None else h.to(input.dtype) for h in _pre_activations(input, w_up, b_up, w_gate, b_gate))
    grad, x, up, gate = _wide(grad_output), _wide(input), _wide(up), _wide(gate)
    keep = _keep(up, seed, dropout_p) if dropout_p > 0 else 1.0
    grad_hidden = grad @ _wide(w_down).to(grad.dtype) * keep
    value, slope = act(up if w_gate is None else gate)
    if w_gate is None:
        hidden, grad_up, grad_gate = value * keep, grad_hidden * slope, None
    else:
        hidden, grad_up, grad_gate = value * up * keep, grad_hidden * value, grad_hidden * up * slope
    grad_input = grad_up @ _wide(w_up).to(grad.dtype)
    if w_gate is not None:
        grad_input = grad_input + grad_gate @ _wide(w_gate).to(grad.dtype)
    gradients = (
        lambda: grad_input.to(input.dtype),
        lambda: added(grad_up.T @ x, main_up).to(w_up.dtype),
        lambda: grad_up.sum(0),
        lambda: added(grad_gate.T @ x, main_gate).to(w_gate.dtype),  # type: ignore[union-attr]
        lambda: grad_gate.sum(0),  # type: ignore[union-attr]
        lambda: added(grad.T @ hidden, main_down).to(w_down.dtype),
        lambda: grad.sum(0),
    )
    dtypes = (input, w_up, grad, w_up if w_gate is None else w_gate, grad, w_down, grad)
    return tuple(g() if want else like.new_empty(0) for g, like, want in zip(gradients, dtypes, wanted, strict=True))
