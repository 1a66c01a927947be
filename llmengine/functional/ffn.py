"""The feed-forward block of a transformer layer, plain or gated."""

from __future__ import annotations

from torch import Tensor

from llmengine.functional.arguments import (
    autocast,
    check_float,
    check_probability,
    check_same_device,
    draw_seed,
    main_grad,
    needs_grad,
    parameter_like,
)
from llmengine.ops import ffn as ops


def ffn(
    input: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """down(dropout(act(up(x)))), or with w_gate down(dropout(act(gate(x)) up(x))) (Vaswani et al. 2017; Shazeer 2020).

    activation: "gelu" (exact, by erf), "gelu_tanh" (its tanh approximation), "relu", "relu_squared" (So et al. 2021) or
    "silu"; a gate with silu is SwiGLU. Dropout falls on the hidden layer.

    residual: like input, added to the result, as a pre-norm layer does: in the second product's epilogue, which rounds
    once (twice beside cuBLAS, with b_down), where it has the result's dtype (PyTorch adds another, and the result has
    the dtype of their sum).

    Shapes: input (*, d); w_up and w_gate (f, d), w_down (d, f), as nn.Linear holds them; b_up and b_gate (f,), b_down
    (d,). The result is like input. Parameters are in input's dtype, or float32 beside a 16-bit input (as under
    autocast, which casts input alone): products are then taken in input's precision, and gradients come back in each
    parameter's dtype.

    recompute: memory or speed. For the backward are kept input and the pre-activations (tokens x f, twice that with a
    gate), or with recompute input alone: the backward then makes the pre-activations once more, by the first product,
    for the time of one product beside six (two beside nine with a gate), and holds them while it runs. Same bits. The
    hidden layer after activation and dropout is always formed again rather than kept.

    Raises ValueError on shapes, dtypes, devices or options that do not fit.
    """
    op = "ffn"
    check_float(op, "input", input)
    if activation not in ops.ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; allowed: {', '.join(map(repr, ops.ACTIVATIONS))}")
    check_probability(op, "dropout_p", dropout_p)
    if input.ndim == 0:
        raise ValueError(f"{op}: input has shape (); expected (*, d)")
    if b_gate is not None and w_gate is None:
        raise ValueError(f"{op}: b_gate was given without w_gate; give both, or neither")
    check_float(op, "w_up", w_up)
    check_float(op, "w_down", w_down)
    d, f = input.shape[-1], w_up.shape[0] if w_up.ndim else 0
    (x,) = autocast(input)
    w_up, b_up = parameter_like(op, "w_up", w_up, (f, d), x), parameter_like(op, "b_up", b_up, (f,), x)
    w_gate, b_gate = parameter_like(op, "w_gate", w_gate, (f, d), x), parameter_like(op, "b_gate", b_gate, (f,), x)
    w_down, b_down = parameter_like(op, "w_down", w_down, (d, f), x), parameter_like(op, "b_down", b_down, (d,), x)
    rows = None if residual is None else _rows_like(op, residual, x)
    parameters = {"w_up": w_up, "b_up": b_up, "w_gate": w_gate, "b_gate": b_gate, "w_down": w_down, "b_down": b_down}
    check_same_device(op, input=input, residual=residual, **parameters)
    seed = draw_seed(input.device) if dropout_p > 0 else None
    tokens = x.shape[:-1].numel()
    tensors = (x.reshape(tokens, d), w_up, b_up, w_gate, b_gate, w_down, b_down, rows)
    options = (seed, activation, float(dropout_p))
    if needs_grad(*tensors):
        weights = {"w_up": w_up, "w_gate": w_gate, "w_down": w_down}
        mains = (main_grad(op, argument, weight) for argument, weight in weights.items())
        output = ops.FeedForward.apply(*tensors, *options, recompute, *mains)
    else:
        output = ops.ffn_forward(*tensors, *options, False)[0]
    output = output.view(x.shape)
    return output if residual is None or rows is not None else residual + output


def _rows_like(op: str, residual: Tensor, x: Tensor) -> Tensor | None:
    """The residual as kernels take it, or None: it has another dtype than they would return."""
    check_float(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; expected input's, {tuple(x.shape)}")
    return residual.reshape(x.shape[:-1].numel(), x.shape[-1]) if residual.dtype == x.dtype else None
