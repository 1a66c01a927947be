"""Feed-forward block, plain or gated: schemas, fake kernels, autograd.

Kernels see tokens: ``input`` is (tokens, d), the hidden layer (tokens, f), weights as in nn.Linear (out, in).
Parameters are in input's dtype, or float32 beside a 16-bit input: products are then taken in input's precision, and
gradients come back in each parameter's own dtype.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")


def _forward_fake(
    input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed, activation, dropout_p, save
):  # fmt: skip
    hidden = (input.shape[0], w_up.shape[0])
    return (
        input.new_empty(input.shape),
        input.new_empty(hidden if save else (0,)),
        input.new_empty(hidden if save and w_gate is not None else (0,)),
    )


def _backward_fake(grad_output, input, w_up, w_gate, w_down, up, gate, seed, activation, dropout_p, wanted):
    line = statistics_dtype(input)
    d, f = input.shape[1], w_up.shape[0]
    gradients = (
        (input.shape, input.dtype), (w_up.shape, w_up.dtype), ((f,), line),
        (w_up.shape, w_up.dtype if w_gate is None else w_gate.dtype), ((f,), line),
        (w_down.shape, w_down.dtype), ((d,), line),
    )  # fmt: skip
    return tuple(
        input.new_empty(shape if want else (0,), dtype=dtype)
        for (shape, dtype), want in zip(gradients, wanted, strict=True)
    )


# up and gate: the pre-activations, kept for the backward where `save` is set (gate only with w_gate), else empty.
ffn_forward = define(
    "ffn_forward(Tensor input, Tensor w_up, Tensor? b_up, Tensor? w_gate, Tensor? b_gate, Tensor w_down,"
    " Tensor? b_down, Tensor? seed, str activation, float dropout_p, bool save)"
    " -> (Tensor output, Tensor up, Tensor gate)",
    _forward_fake,
)
# wanted: one flag for each of the seven gradients, in their order; the others come back empty.
ffn_backward = define(
    "ffn_backward(Tensor grad_output, Tensor input, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor up, Tensor gate,"
    " Tensor? seed, str activation, float dropout_p, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_w_up, Tensor grad_b_up, Tensor grad_w_gate, Tensor grad_b_gate,"
    " Tensor grad_w_down, Tensor grad_b_down)",
    _backward_fake,
)


class FeedForward(torch.autograd.Function):
    """ffn(input): -> output. Keeps the pre-activations; the hidden layer itself is formed again in the backward."""

    @staticmethod
    def forward(ctx, input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed, activation, dropout_p):
        output, up, gate = ffn_forward(
            input, w_up, b_up, w_gate, b_gate, w_down, b_down, seed, activation, dropout_p, True
        )
        ctx.save_for_backward(input, w_up, w_gate, w_down, up, gate, seed)
        ctx.options = activation, dropout_p
        ctx.bias_dtypes = {i: b.dtype for i, b in ((2, b_up), (4, b_gate), (6, b_down)) if b is not None}
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        wanted = list(ctx.needs_input_grad[:7])
        gradients = ffn_backward(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
        return *(
            g.to(ctx.bias_dtypes.get(i, g.dtype)) if want else None
            for i, (g, want) in enumerate(zip(gradients, wanted, strict=True))
        ), None, None, None  # fmt: skip
