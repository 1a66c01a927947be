"""Feed-forward block, plain or gated: schemas, fake kernels, autograd.

Kernels see tokens: ``input`` is (tokens, d), the hidden layer (tokens, f), weights as in nn.Linear (out, in).
Parameters are in input's dtype, or float32 beside a 16-bit input: products are then taken in input's precision, and
gradients come back in each parameter's own dtype. A weight's gradient may be added to a buffer (optim/main_grad.py).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_gradients
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")


def _forward_fake(
    input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, save
):  # fmt: skip
    hidden = (input.shape[0], w_up.shape[0])
    return (
        input.new_empty(input.shape),
        input.new_empty(hidden if save else (0,)),
        input.new_empty(hidden if save and w_gate is not None else (0,)),
    )


def _backward_fake(
    grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed, activation, dropout_p, main_up, main_gate,
    main_down, wanted,
):  # fmt: skip
    line = statistics_dtype(input)
    d, f = input.shape[1], w_up.shape[0]
    gradients = (
        (input.shape, input.dtype), (w_up.shape, w_up.dtype), ((f,), line),
        (w_up.shape, w_up.dtype if w_gate is None else w_gate.dtype), ((f,), line),
        (w_down.shape, w_down.dtype), ((d,), line),
    )  # fmt: skip
    return empty_gradients(input, gradients, wanted, {1: main_up, 3: main_gate, 5: main_down})


# residual: like input, added to the output. up and gate: the pre-activations, kept for the backward where `save` is set
# (gate only with w_gate), else empty.
ffn_forward = define(
    "ffn_forward(Tensor input, Tensor w_up, Tensor? b_up, Tensor? w_gate, Tensor? b_gate, Tensor w_down,"
    " Tensor? b_down, Tensor? residual, Tensor? seed, str activation, float dropout_p, bool save)"
    " -> (Tensor output, Tensor up, Tensor gate)",
    _forward_fake,
)
# up and gate: None where they were not kept; the first product, with its biases, then makes them once more. One node
# that needs grad_output, so that no graph of forward and backward together makes them early and keeps them.
# wanted: one flag for each of the seven gradients, in their order; the others come back empty, and so does that of a
# weight with a buffer.
ffn_backward = define(
    "ffn_backward(Tensor grad_output, Tensor input, Tensor w_up, Tensor? b_up, Tensor? w_gate, Tensor? b_gate,"
    " Tensor w_down, Tensor? up, Tensor? gate, Tensor? seed, str activation, float dropout_p, Tensor(a!)? main_up,"
    " Tensor(b!)? main_gate, Tensor(c!)? main_down, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_w_up, Tensor grad_b_up, Tensor grad_w_gate, Tensor grad_b_gate,"
    " Tensor grad_w_down, Tensor grad_b_down)",
    _backward_fake,
)


class FeedForward(torch.autograd.Function):
    """ffn(input): -> output. Keeps the pre-activations unless they are to be made again (`recompute`); the hidden layer
    itself always is. Of the residual nothing is kept: its gradient is the output's. mains: buffers of w_up, w_gate and
    w_down."""

    @staticmethod
    def forward(
        ctx, input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, recompute, *mains
    ):
        output, up, gate = ffn_forward(
            input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, not recompute
        )
        kept = (None, None) if recompute else (up, gate)
        ctx.save_for_backward(input, w_up, b_up, w_gate, b_gate, w_down, *kept, seed)
        ctx.options = activation, dropout_p, *mains
        ctx.bias_dtypes = {i: b.dtype for i, b in ((2, b_up), (4, b_gate), (6, b_down)) if b is not None}
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        wanted = list(ctx.needs_input_grad[:7])
        gradients = ffn_backward(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
        mains = dict(zip((1, 3, 5), ctx.options[2:], strict=True))
        return *(
            g.to(ctx.bias_dtypes.get(i, g.dtype)) if want and mains.get(i) is None else None
            for i, (g, want) in enumerate(zip(gradients, wanted, strict=True))
        ), grad_output if ctx.needs_input_grad[7] else None, *(None,) * 7  # fmt: skip
