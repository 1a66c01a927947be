"""Cases of the feed-forward block: every activation, plain and gated, with and without biases, dropout, odd sizes."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.backends.reference.philox import keep_multiplier
from llmengine.functional.arguments import draw_seed
from llmengine.testing.sample import Operator, Sample

ACTIVATIONS = {
    "gelu": torch_functional.gelu,
    "gelu_tanh": lambda x: torch_functional.gelu(x, approximate="tanh"),
    "relu": torch_functional.relu,
    "relu_squared": lambda x: torch_functional.relu(x).square(),
    "silu": torch_functional.silu,
}


def plain(
    input, w_up, w_down, *, b_up=None, b_down=None, w_gate=None, b_gate=None, residual=None, activation="gelu",
    dropout_p=0.0,
):  # fmt: skip
    """The contract in PyTorch's own operators, with the engine's dropout."""
    act = ACTIVATIONS[activation]
    hidden = torch_functional.linear(input, w_up, b_up)
    if w_gate is None:
        hidden = act(hidden)
    else:
        hidden = act(torch_functional.linear(input, w_gate, b_gate)) * hidden
    if dropout_p > 0:
        rows = torch.arange(hidden.shape[:-1].numel())
        keep = keep_multiplier(draw_seed(input.device), dropout_p, 0, rows, hidden.shape[-1], hidden.dtype)
        hidden = hidden * keep.view(hidden.shape)
    output = torch_functional.linear(hidden, w_down, b_down)
    return output if residual is None else residual + output


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    def sample(shape, f, activation, *, gated=False, biases=True, dropout_p=0.0):
        d = shape[-1]
        weight, narrow = max(d, 1) ** -0.5, max(f, 1) ** -0.5
        kwargs = {"activation": activation, "dropout_p": dropout_p}
        if gated:
            kwargs["w_gate"] = randn(f, d, scale=2 * weight)
        if biases:
            kwargs |= {"b_up": randn(f), "b_down": randn(d)}
            if gated:
                kwargs["b_gate"] = randn(f)
        name = f"{shape} f={f} {activation}{' gated' * gated}{' biases' * biases} p={dropout_p}"
        return Sample(name, (randn(*shape), randn(f, d, scale=2 * weight), randn(d, f, scale=narrow)), kwargs)

    def with_options(*activations):
        for activation, gated, biases, p in itertools.product(activations, (False, True), (True, False), (0.0, 0.3)):
            yield sample((5, 24), 40, activation, gated=gated, biases=biases, dropout_p=p)

    samples = [*with_options("gelu", "gelu_tanh", "relu", "silu")]
    for gated, p in itertools.product((False, True), (0.0, 0.2)):
        for shape, f in [
            ((1, 1), 1), ((11, 7), 5), ((2, 3, 17), 33), ((130, 65), 129), ((7, 300), 20), ((0, 8), 16), ((64,), 70),
            ((33, 96), 1030),
        ]:  # fmt: skip
            samples.append(sample(shape, f, "gelu", gated=gated, dropout_p=p))
    samples += with_options("relu_squared")  # last: what is drawn for the others stays as it was
    for shape, f, gated, biases, p in [
        ((11, 7), 5, True, True, 0.0), ((2, 3, 24), 40, False, True, 0.3), ((130, 65), 129, False, False, 0.0),
        ((0, 8), 16, False, True, 0.0), ((64,), 70, True, False, 0.0),
    ]:  # fmt: skip
        added = sample(shape, f, "silu", gated=gated, biases=biases, dropout_p=p)
        samples.append(Sample(f"{added.name} residual", added.args, added.kwargs | {"residual": randn(*shape)}))
    return samples


OPERATORS = [Operator("ffn", functional.ffn, _samples, plain)]
