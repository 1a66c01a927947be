"""Feed-forward block, plain or gated (csrc/ops/ffn.h).

Forward: one kernel forms the hidden layer: a product (two over the same rows where there is a gate, with two
accumulators, so that the input is read once), and on the accumulators, before anything is stored, bias, activation,
gate and dropout. A second product with bias and residual gives the output. 4 d f tokens flops (6 gated).

Backward: one kernel multiplies the output's gradient by w_down and, on the accumulators, turns it into the gradients of
the pre-activations, forming the hidden layer again for w_down's gradient. Products give the gradients of the input (up
and gate added up in one accumulator) and of the weights; the biases' are sums over columns. 8 d f tokens flops (12).

The limit aimed at is the matrix units' rate: beside the operands only the pre-activations and, in the backward, three
matrices of their size pass through memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from llmengine.backends.triton.columns import column_sums
from llmengine.backends.triton.device import dropped_below, precision, refuses_tensors, unit_last_stride
from llmengine.backends.triton.gemm import accumulate, gemm, tile_place, weight_gradient
from llmengine.backends.triton.maths import tanh
from llmengine.backends.triton.philox import keep_multipliers
from llmengine.backends.triton.tiles import pick
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu_squared":
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive, 2.0 * positive
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = tl.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit
def _hidden_forward(
    x, w_up, b_up, w_gate, b_gate, seed, up, gate, hidden, M, N, K, x_m, up_n, gate_n, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_place(M, N, BLOCK_M, BLOCK_N, GROUP)
    m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    n = column + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m[:, None] * N + n[None, :]
    u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if w_gate is None:
        u = accumulate(u, x, w_up, m, n, M, N, 0, K, x_m, 1, 1, up_n, BLOCK_K, EVEN, PRECISION)
        u = _with_bias(u, b_up, n, N)
        h, _ = _value_and_slope(u, ACTIVATION)
    else:
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        u, g = _accumulate_two(u, g, x, w_up, w_gate, m, n, M, N, K, x_m, up_n, gate_n, BLOCK_K, EVEN, PRECISION)
        u = _with_bias(u, b_up, n, N)
        g = _with_bias(g, b_gate, n, N)
        h, _ = _value_and_slope(g, ACTIVATION)
        h *= u
        if gate is not None:
            tl.store(gate + place, g.to(gate.dtype.element_ty), inside)
    if up is not None:
        tl.store(up + place, u.to(up.dtype.element_ty), inside)
    if hidden is not None:
        if seed is not None:
            h *= keep_multipliers(seed, threshold, keep_scale, 0, m, column // 4 + tl.arange(0, BLOCK_N // 4))
        tl.store(hidden + place, h.to(hidden.dtype.element_ty), inside)


@triton.jit
def _accumulate_two(
    u, g, x, w_up, w_gate, m, n, M, N, K, x_m, up_n, gate_n,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both products of a gated block, over one read of the rows of x."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = x + m[:, None] * x_m + k[None, :]
    for_up = w_up + k[:, None] + n[None, :] * up_n
    for_gate = w_gate + k[:, None] + n[None, :] * gate_n
    for start in range(0, K, BLOCK_K):
        inside_x, inside_w = (m < M)[:, None], (n < N)[None, :]
        if not EVEN:
            inside_x &= (start + tl.arange(0, BLOCK_K) < K)[None, :]
            inside_w &= (start + tl.arange(0, BLOCK_K) < K)[:, None]
        tile = tl.load(left, inside_x, 0.0)
        u = tl.dot(tile, tl.load(for_up, inside_w, 0.0), u, input_precision=PRECISION)
        g = tl.dot(tile, tl.load(for_gate, inside_w, 0.0), g, input_precision=PRECISION)
        left += BLOCK_K
        for_up += BLOCK_K
        for_gate += BLOCK_K
    return u, g


@triton.jit
def _with_bias(x, bias, n, N):
    if bias is not None:
        x += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _hidden_backward(
    grad_output, w_down, up, gate, seed, hidden, grad_up, grad_gate, M, N, K, grad_m, down_k, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_place(M, N, BLOCK_M, BLOCK_N, GROUP)
    m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    n = column + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m[:, None] * N + n[None, :]
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad = accumulate(grad, grad_output, w_down, m, n, M, N, 0, K, grad_m, 1, down_k, 1, BLOCK_K, EVEN, PRECISION)
    u = tl.load(up + place, inside, 0.0).to(tl.float32)
    if gate is None:
        h, slope = _value_and_slope(u, ACTIVATION)
    else:
        value, slope = _value_and_slope(tl.load(gate + place, inside, 0.0).to(tl.float32), ACTIVATION)
        h = value * u
    if seed is not None:
        keep = keep_multipliers(seed, threshold, keep_scale, 0, m, column // 4 + tl.arange(0, BLOCK_N // 4))
        h *= keep
        grad *= keep
    if hidden is not None:
        tl.store(hidden + place, h.to(hidden.dtype.element_ty), inside)
    if gate is not None:
        tl.store(grad_gate + place, (grad * u * slope).to(grad_gate.dtype.element_ty), inside)
        slope = value
    tl.store(grad_up + place, (grad * slope).to(grad_up.dtype.element_ty), inside)


def _in(dtype, weight):
    """A weight in the precision of the products, its rows contiguous."""
    return unit_last_stride(weight.to(dtype))


def _line(bias):
    return None if bias is None else bias.contiguous()


def _forward_refuses(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, *_):
    return refuses_tensors(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual)


@kernel(KERNELS, "ffn_forward", _forward_refuses)
def ffn_forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, save):
    hidden = input.new_empty(input.shape[0], w_up.shape[0])
    up = torch.empty_like(hidden) if save else None
    gate = torch.empty_like(hidden) if save and w_gate is not None else None
    _form_hidden(input, w_up, b_up, w_gate, b_gate, seed, activation, dropout_p, up, gate, hidden)
    kept = (input.new_empty(0) if h is None else h for h in (up, gate))
    stream = None if residual is None else unit_last_stride(residual)
    return gemm(hidden, _in(input.dtype, w_down).T, bias=_line(b_down), residual=stream), *kept


def _form_hidden(input, w_up, b_up, w_gate, b_gate, seed, activation, dropout_p, up, gate, hidden):
    """The first product, into those of the last three that are given."""
    (tokens, d), f = input.shape, w_up.shape[0]
    if not tokens * f:
        return
    x, up_weight = unit_last_stride(input), _in(input.dtype, w_up)
    gate_weight = None if w_gate is None else _in(x.dtype, w_gate)
    tile = pick("fused" if w_gate is None else "pair", x, up_weight.T)
    _hidden_forward[(tile.programs(tokens, f),)](
        x, up_weight, _line(b_up), gate_weight, _line(b_gate), seed if dropout_p > 0 else None, up, gate, hidden,
        tokens, f, d, x.stride(0), up_weight.stride(0), 0 if gate_weight is None else gate_weight.stride(0),
        dropped_below(dropout_p), 1.0 / (1.0 - dropout_p), activation, EVEN=d % tile.k == 0,
        PRECISION=precision(x.dtype, x.device), **tile.constants(),
    )  # fmt: skip


def _pre_activations(input, w_up, b_up, w_gate, b_gate):
    """As a forward that keeps them makes them, by the same kernel."""
    up = input.new_empty(input.shape[0], w_up.shape[0])
    gate = None if w_gate is None else torch.empty_like(up)
    _form_hidden(input, w_up, b_up, w_gate, b_gate, None, "relu", 0.0, up, gate, None)
    return up, gate


def _backward_refuses(grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, *_):
    return refuses_tensors(grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate)


@kernel(KERNELS, "ffn_backward", _backward_refuses)
def ffn_backward(
    grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed, activation, dropout_p, main_up, main_gate,
    main_down, wanted,
):  # fmt: skip
    if up is None:
        up, gate = _pre_activations(input, w_up, b_up, w_gate, b_gate)
    (tokens, d), f = input.shape, w_up.shape[0]
    grad, x = unit_last_stride(grad_output), unit_last_stride(input)
    up_weight, down_weight = _in(x.dtype, w_up), _in(x.dtype, w_down)
    gate_weight = None if w_gate is None else _in(x.dtype, w_gate)
    gated = w_gate is not None
    grad_up = torch.empty_like(up)
    grad_gate = torch.empty_like(up) if gated else None
    hidden = torch.empty_like(up) if wanted[5] else None
    if any(wanted[:6]) and up.numel():
        tile = pick("pair", grad, down_weight)
        _hidden_backward[(tile.programs(tokens, f),)](
            grad, down_weight, up, gate if gated else None, seed if dropout_p > 0 else None, hidden, grad_up, grad_gate,
            tokens, f, d, grad.stride(0), down_weight.stride(0), dropped_below(dropout_p), 1.0 / (1.0 - dropout_p),
            activation, EVEN=d % tile.k == 0, PRECISION=precision(x.dtype, x.device), **tile.constants(),
        )  # fmt: skip

    gate_dtype = w_gate.dtype if gated else w_up.dtype
    gradients = (
        lambda: gemm(grad_up, up_weight, second=(grad_gate, gate_weight) if gated else None),
        lambda: weight_gradient(grad_up, x, w_up.dtype, main_up),
        lambda: column_sums(grad_up),
        lambda: weight_gradient(grad_gate, x, gate_dtype, main_gate),
        lambda: column_sums(grad_gate),
        lambda: weight_gradient(grad, hidden, w_down.dtype, main_down),
        lambda: column_sums(grad),
    )
    nothing = (x.dtype, w_up.dtype, torch.float32, gate_dtype, torch.float32, w_down.dtype, torch.float32)
    return tuple(
        gradient() if want else x.new_empty(0, dtype=dtype)
        for gradient, want, dtype in zip(gradients, wanted, nothing, strict=True)
    )


def aot_calls(dtype: torch.dtype):
    """Plain and gated, with and without dropout; large, small and unaligned (aot.py)."""

    def call(tokens, d, f, activation, gated, dropout_p):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        x, w_up, w_down, b_up, b_down = empty(tokens, d), empty(f, d), empty(d, f), empty(f), empty(d)
        w_gate, b_gate = (w_up, b_up) if gated else (None, None)
        seed, options = empty(1, dtype=torch.int64), (activation, dropout_p)
        residual = None if d > 1000 else x
        output, up, gate = ffn_forward(x, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, *options, True)
        wanted = [True, True, True, gated, gated, True, True]
        given, mains = (output, x, w_up, b_up, w_gate, b_gate, w_down), (None, None, None)
        ffn_backward(*given, up, gate, seed, *options, *mains, wanted)
        if activation == "silu":  # neither kept pre-activations nor gradients of weights of their own
            main_up, main_down = empty(f, d, dtype=torch.float32), empty(d, f, dtype=torch.float32)
            ffn_backward(*given, None, None, seed, *options, main_up, main_up if gated else None, main_down, wanted)

    for tokens, d, f, activation, gated, dropout_p in [
        (8192, 768, 3072, "gelu", False, 0.1), (8192, 4096, 14336, "silu", True, 0.0),
        (8192, 1024, 4096, "gelu_tanh", True, 0.1), (512, 768, 3072, "relu", False, 0.0),
        (8, 768, 3072, "gelu_tanh", False, 0.0), (300, 257, 1001, "silu", True, 0.1),
    ]:  # fmt: skip
        kind = f"{tokens} x {d} x {f} {activation}" + " gated" * gated + " dropout" * (dropout_p > 0)
        yield kind, functools.partial(call, tokens, d, f, activation, gated, dropout_p)
    if dtype == torch.float32:
        yield "TF32", functools.partial(call, 8192, 1024, 4096, "gelu_tanh", True, 0.1)
