"""Feed-forward block in CUDA: PyTorch's products (cuBLAS), which add the biases, and what lies between them in one
kernel each way, csrc/cuda/ffn.cu; or, where `Native.core_of` says so, all of it by csrc/cuda/ffn_products.cu."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import destinations, empty_gradients
from llmengine.backends.cuda.native import Native, parameter, parts_of, unit_last_stride
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, *_):
        tensors = (input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed)
        return native.refuses_tensors(*tensors) or native.refuses_products(input)

    def backward_refuses(grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed, *_):
        tensors = (grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed)
        return native.refuses_tensors(*tensors) or native.refuses_products(input)

    def linear(x, weight, bias):
        """Products are taken in the precision of x, whatever the parameters have."""
        return native.product(x, weight.to(x.dtype).T, None if bias is None else bias.to(x.dtype))

    def pre_activations(input, w_up, b_up, w_gate, b_gate):
        return linear(input, w_up, b_up), None if w_gate is None else linear(input, w_gate, b_gate)

    def made_again(input, w_up, b_up, w_gate, b_gate, w_down):
        """The pre-activations, by the very products that the forward had them from: with their bits."""
        core = native.core_of("ffn", input, w_up, w_gate, part="pre-activations again")
        if core is None:
            return pre_activations(input, w_up, b_up, w_gate, b_gate)
        return fused_pre_activations(native, core, input, w_up, b_up, w_gate, b_gate, w_down)

    @kernel(table, "ffn_forward", forward_refuses)
    def ffn_forward(input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, save):
        if core := native.core_of("ffn", input, w_up, w_gate):
            return fused_forward(
                native, core, input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p,
                save,
            )  # fmt: skip
        up, gate = pre_activations(input, w_up, b_up, w_gate, b_gate)
        hidden = torch.empty_like(up)
        native.call(
            "ffn_hidden_forward", up, up=up, gate=gate, seed=seed, activation=activation, dropout_p=dropout_p,
            hidden=hidden,
        )  # fmt: skip
        kept = [x if save and x is not None else input.new_empty(0) for x in (up, gate)]
        output = linear(hidden, w_down, residual if b_down is None else b_down)
        if residual is not None and b_down is not None:  # which cuBLAS adds one of
            output.add_(residual)
        return output, *kept

    @kernel(table, "ffn_backward", backward_refuses)
    def ffn_backward(
        grad_output, input, w_up, b_up, w_gate, b_gate, w_down, up, gate, seed, activation, dropout_p, main_up,
        main_gate, main_down, wanted,
    ):  # fmt: skip
        mains = {1: main_up, 3: main_gate, 5: main_down}
        if up is None:
            up, gate = made_again(input, w_up, b_up, w_gate, b_gate, w_down)
        if core := native.core_of("ffn", input, w_up, w_gate, backward=True):
            return fused_backward(
                native, core, grad_output, input, w_up, w_gate, w_down, up, gate, seed, activation, dropout_p, mains,
                wanted,
            )  # fmt: skip
        gated, dtype = w_gate is not None, input.dtype
        gate_dtype = w_gate.dtype if gated else w_up.dtype
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
            (lambda: native.weight_gradient(grad_up, input, w_up.dtype, main_up), w_up.dtype),
            (lambda: grad_up.sum(0, dtype=torch.float32), torch.float32),
            (lambda: native.weight_gradient(grad_gate, input, gate_dtype, main_gate), gate_dtype),
            (lambda: grad_gate.sum(0, dtype=torch.float32), torch.float32),
            (lambda: native.weight_gradient(grad_output, hidden, w_down.dtype, main_down), w_down.dtype),
            (lambda: grad_output.sum(0, dtype=torch.float32), torch.float32),
        )
        made = [
            gradient() if want else input.new_empty(0, dtype=wide)
            for (gradient, wide), want in zip(gradients, wanted, strict=True)
        ]
        return tuple(
            input.new_empty(0, dtype=wide) if mains.get(i) is not None else gradient
            for i, (gradient, (_, wide)) in enumerate(zip(made, gradients, strict=True))
        )

    return table


# ---- products of our own ---------------------------------------------------------------------------------------------

TILE = 128  # tokens of a tile, two rows of partial sums, as in csrc/cuda/ffn_products.cuh


def fused_forward(
    native, core, input, w_up, b_up, w_gate, b_gate, w_down, b_down, residual, seed, activation, dropout_p, save
):
    hidden = input.new_empty(input.shape[0], w_up.shape[0])
    up, gate = (torch.empty_like(hidden) if save and w is not None else input.new_empty(0) for w in (w_up, w_gate))
    output = input.new_empty(input.shape)
    native.call(
        "ffn_forward", input, input=unit_last_stride(input), w_up=_operand(w_up, input), b_up=parameter(b_up, input),
        w_gate=_operand(w_gate, input), b_gate=parameter(b_gate, input), w_down=_operand(w_down, input),
        b_down=parameter(b_down, input), residual=unit_last_stride(residual), seed=seed, activation=activation,
        dropout_p=dropout_p, output=output, hidden=hidden, up=up if save else None,
        gate=gate if save and w_gate is not None else None,
        **native.products(input, core),
    )  # fmt: skip
    return output, up, gate


def fused_pre_activations(native, core, input, w_up, b_up, w_gate, b_gate, w_down):
    """As a forward that keeps them makes them, by its own first product."""
    up = input.new_empty(input.shape[0], w_up.shape[0])
    gate = None if w_gate is None else torch.empty_like(up)
    native.call(
        "ffn_forward", input, input=unit_last_stride(input), w_up=_operand(w_up, input), b_up=parameter(b_up, input),
        w_gate=_operand(w_gate, input), b_gate=parameter(b_gate, input), w_down=_operand(w_down, input), b_down=None,
        residual=None, seed=None, activation="relu", dropout_p=0.0, output=None, hidden=None, up=up, gate=gate,
        **native.products(input, core),
    )  # fmt: skip
    return up, gate


def fused_backward(
    native, core, grad_output, input, w_up, w_gate, w_down, up, gate, seed, activation, dropout_p, mains, wanted
):
    (tokens, d), f, gated = input.shape, w_up.shape[0], w_gate is not None
    grad_up = input.new_empty(tokens, f)
    weights = (w_up, w_gate if gated else w_up, w_down)
    shapes = (input.shape, w_up.shape, (f,), w_up.shape, (f,), w_down.shape, (d,))
    dtypes = [t for w in weights for t in (w.dtype, torch.float32)]
    gradients = empty_gradients(input, tuple(zip(shapes, (input.dtype, *dtypes), strict=True)), wanted, mains)
    names = ("input", "w_up", "b_up", "w_gate", "b_gate", "w_down", "b_down")
    lines = 2 * -(-tokens // TILE)
    rooms = {"up": (wanted[2], lines, f), "gate": (wanted[4], lines, f), "down": (wanted[6], parts_of(tokens), d)}
    native.call(
        "ffn_backward", input, grad_output=unit_last_stride(grad_output), input=unit_last_stride(input),
        w_up=_operand(w_up, input), w_gate=_operand(w_gate, input), w_down=_operand(w_down, input),
        up=unit_last_stride(up), gate=unit_last_stride(gate) if gated else None, seed=seed, activation=activation,
        dropout_p=dropout_p, hidden=torch.empty_like(grad_up) if wanted[5] else None, grad_up=grad_up,
        grad_gate=torch.empty_like(grad_up) if gated else None,
        **{f"grad_{n}": g for n, g in zip(names, destinations(gradients, wanted, mains), strict=True)},
        **{f"add_{names[i]}": main is not None for i, main in mains.items()},
        **{f"partial_{n}": input.new_empty(shape, dtype=torch.float32) if want else None
           for n, (want, *shape) in rooms.items()},
        **native.products(input, core),
    )  # fmt: skip
    return gradients


def _operand(weight, input):
    """A weight in the precision of the products, which are taken in input's."""
    return None if weight is None else unit_last_stride(weight.to(input.dtype))
