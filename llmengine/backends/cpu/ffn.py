"""Feed-forward block on the CPU: csrc/cpu/kernels/ffn.cpp."""

from __future__ import annotations

import torch

from llmengine.backends.cpu.native import contiguous, module, refuses_tensors, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _forward_refuses(input, w_up, b_up, w_gate, b_gate, w_down, b_down, *_):
    return refuses_tensors(input, w_up, b_up, w_gate, b_gate, w_down, b_down)


def _backward_refuses(grad_output, input, w_up, w_gate, w_down, up, gate, *_):
    return refuses_tensors(grad_output, input, w_up, w_gate, w_down, up, gate)


@kernel(KERNELS, "ffn_forward", _forward_refuses)
def ffn_forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed, activation, dropout_p, save):
    gated, hidden = w_gate is not None, (input.shape[0], w_up.shape[0])
    output = torch.empty(input.shape, dtype=input.dtype)
    up = torch.empty(hidden if save else (0,), dtype=input.dtype)
    gate = torch.empty(hidden if save and gated else (0,), dtype=input.dtype)
    module.ffn_forward(
        input=unit_last_stride(input), w_up=unit_last_stride(w_up), b_up=contiguous(b_up),
        w_gate=unit_last_stride(w_gate), b_gate=contiguous(b_gate), w_down=unit_last_stride(w_down),
        b_down=contiguous(b_down), seed=seed, activation=activation, dropout_p=dropout_p, output=output,
        hidden=torch.empty(hidden, dtype=input.dtype), up=up if save else None, gate=gate if save and gated else None,
    )  # fmt: skip
    return output, up, gate


@kernel(KERNELS, "ffn_backward", _backward_refuses)
def ffn_backward(grad_output, input, w_up, w_gate, w_down, up, gate, seed, activation, dropout_p, wanted):
    d, f = input.shape[1], w_up.shape[0]
    gated = w_gate is not None
    names = ("grad_input", "grad_w_up", "grad_b_up", "grad_w_gate", "grad_b_gate", "grad_w_down", "grad_b_down")
    shapes = (input.shape, (f, d), (f,), (f, d), (f,), (d, f), (d,))
    gate_dtype = w_gate.dtype if gated else w_up.dtype
    dtypes = (input.dtype, w_up.dtype, torch.float32, gate_dtype, torch.float32, w_down.dtype, torch.float32)
    gradients = [
        torch.empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    module.ffn_backward(
        grad_output=unit_last_stride(grad_output), input=unit_last_stride(input), w_up=unit_last_stride(w_up),
        w_gate=unit_last_stride(w_gate), w_down=unit_last_stride(w_down), up=up, gate=gate if gated else None,
        seed=seed, activation=activation, dropout_p=dropout_p, hidden=torch.empty_like(up),
        grad_up=torch.empty_like(up), grad_gate=torch.empty_like(up) if gated else None,
        **{name: g if want else None for name, g, want in zip(names, gradients, wanted, strict=True)},
    )  # fmt: skip
    return tuple(gradients)
