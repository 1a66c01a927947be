"""Feed-forward block on the CPU: csrc/cpu/kernels/ffn.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import destinations, empty_gradients
from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _forward_refuses(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, *_):
    return refuses_tensors(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual)


def _backward_refuses(grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, *_):
    return refuses_tensors(grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate)


@kernel(KERNELS, "ffn_forward", _forward_refuses)
def ffn_forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, save):
    output, hidden = input.new_empty(input.shape), input.new_empty(input.shape[0], w_up.shape[0])
    up = torch.empty_like(hidden) if save else None
    gate = torch.empty_like(hidden) if save and w_gate is not None else None
    _forward(
        input, w_up, b_up, w_gate, b_gate, w_down, b_down, up, gate, residual=unit_last_stride(residual), seed=seed,
        activation=activation, dropout_p=dropout_p, output=output, hidden=hidden,
    )  # fmt: skip
    return output, *(input.new_empty(0) if h is None else h for h in (up, gate))


def _forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, up, gate, **others):
    module.ffn_forward(
        input=unit_last_stride(input), w_up=unit_last_stride(w_up), b_up=contiguous(b_up),
        w_gate=unit_last_stride(w_gate), b_gate=contiguous(b_gate), w_down=unit_last_stride(w_down),
        b_down=contiguous(b_down), up=up, gate=gate, **others,
    )  # fmt: skip


def _pre_activations(input, w_up, b_up, w_gate, b_gate, w_down):
    """As a forward that keeps them makes them, by its own first product."""
    up = input.new_empty(input.shape[0], w_up.shape[0])
    gate = None if w_gate is None else torch.empty_like(up)
    _forward(
        input, w_up, b_up, w_gate, b_gate, w_down, None, up, gate, residual=None, seed=None, activation="relu",
        dropout_p=0.0, output=None, hidden=None,
    )  # fmt: skip
    return up, gate


@kernel(KERNELS, "ffn_backward", _backward_refuses)
def ffn_backward(
    grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed, activation, dropout_p, main_up, main_gate,
    main_down, wanted,
):  # fmt: skip
    d, f = input.shape[1], w_up.shape[0]
    gated = w_gate is not None
    if up is None:
        up, gate = _pre_activations(input, w_up, b_up, w_gate, b_gate, w_down)
    names = ("grad_input", "grad_w_up", "grad_b_up", "grad_w_gate", "grad_b_gate", "grad_w_down", "grad_b_down")
    shapes = (input.shape, (f, d), (f,), (f, d), (f,), (d, f), (d,))
    gate_dtype = w_gate.dtype if gated else w_up.dtype
    dtypes = (input.dtype, w_up.dtype, torch.float32, gate_dtype, torch.float32, w_down.dtype, torch.float32)
    mains = {1: main_up, 3: main_gate, 5: main_down}
    gradients = empty_gradients(input, tuple(zip(shapes, dtypes, strict=True)), wanted, mains)
    module.ffn_backward(
        grad_output=unit_last_stride(grad_output), input=unit_last_stride(input), w_up=unit_last_stride(w_up),
        w_gate=unit_last_stride(w_gate), w_down=unit_last_stride(w_down), up=up, gate=gate if gated else None,
        seed=seed, activation=activation, dropout_p=dropout_p, hidden=torch.empty_like(up) if wanted[5] else None,
        grad_up=torch.empty_like(up), grad_gate=torch.empty_like(up) if gated else None,
        **dict(zip(names, destinations(gradients, wanted, mains), strict=True)),
        add_w_up=main_up is not None, add_w_gate=main_gate is not None, add_w_down=main_down is not None,
    )  # fmt: skip
    return gradients
