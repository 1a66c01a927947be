"""Feed-forward block in CUDA: PyTorch's products (cuBLAS), which add the biases, and what lies between them in one
kernel each way, csrc/cuda/ffn.cu."""

from __future__ import annotations

import torch

from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed, *_):
        return native.refuses_tensors(input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed)

    def backward_refuses(grad_output, input, w_up, w_gate, w_down, up, gate, seed, *_):
        return native.refuses_tensors(grad_output, input, w_up, w_gate, w_down, up, gate, seed)

    def linear(x, weight, bias):
        """Products are taken in the precision of x, whatever the parameters have."""
        return native.product(x, weight.to(x.dtype).T, None if bias is None else bias.to(x.dtype))

    @kernel(table, "ffn_forward", forward_refuses)
    def ffn_forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed, activation, dropout_p, save):
        up = linear(input, w_up, b_up)
        gate = None if w_gate is None else linear(input, w_gate, b_gate)
        hidden = torch.empty_like(up)
        native.call(
            "ffn_hidden_forward", up, up=up, gate=gate, seed=seed, activation=activation, dropout_p=dropout_p,
            hidden=hidden,
        )  # fmt: skip
        kept = [x if save and x is not None else input.new_empty(0) for x in (up, gate)]
        return linear(hidden, w_down, b_down), *kept

    @kernel(table, "ffn_backward", backward_refuses)
    def ffn_backward(grad_output, input, w_up, w_gate, w_down, up, gate, seed, activation, dropout_p, wanted):
        gated, dtype = w_gate is not None, input.dtype
        grad_up = grad_gate = hidden = input.new_empty(0)
        if any(wanted[:6]):
            # until the kernel has turned it, the hidden layer's
            grad_up = native.product(grad_output, w_down.to(dtype))
            grad_gate = torch.empty_like(grad_up) if gated else grad_gate
            hidden = torch.empty_like(grad_up) if wanted[5] else hidden
            native.call(
                "ffn_hidden_backward", up, grad_hidden=grad_up, up=unit_last_stride(up),
                gate=unit_last_stride(gate) if gated else None, seed=seed, activation=activation, dropout_p=dropout_p,
                grad_up=grad_up, grad_gate=grad_gate if gated else None, hidden=hidden if wanted[5] else None,
            )  # fmt: skip

        def grad_input():
            through_up = native.product(grad_up, w_up.to(dtype))
            return native.product(grad_gate, w_gate.to(dtype), through_up) if gated else through_up

        gradients = (
            (grad_input, dtype),
            (lambda: native.product(grad_up.T, input), w_up.dtype),
            (lambda: grad_up.sum(0, dtype=torch.float32), torch.float32),
            (lambda: native.product(grad_gate.T, input), w_gate.dtype if gated else w_up.dtype),
            (lambda: grad_gate.sum(0, dtype=torch.float32), torch.float32),
            (lambda: native.product(grad_output.T, hidden), w_down.dtype),
            (lambda: grad_output.sum(0, dtype=torch.float32), torch.float32),
        )
        return tuple(
            gradient().to(wide) if want else input.new_empty(0, dtype=wide)
            for (gradient, wide), want in zip(gradients, wanted, strict=True)
        )

    return table
