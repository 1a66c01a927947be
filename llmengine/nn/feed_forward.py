"""The position-wise feed-forward network, plain or gated, and its unfused twin for leaves that were replaced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from llmengine import functional
from llmengine.functional.arguments import check_probability
from llmengine.nn.fusing import touched

_torch = torch.nn.functional
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _torch.gelu,
    "gelu_tanh": lambda x: _torch.gelu(x, approximate="tanh"),
    "relu": _torch.relu,
    "relu_squared": lambda x: _torch.relu(x).square(),
    "silu": _torch.silu,
}


class FeedForward(Module):
    """down(dropout(act(up(x)))), or down(dropout(act(gate(x)) * up(x))) when gated (Shazeer 2020).

    Leaves: `up` (dim_feedforward, d_model), `down` (d_model, dim_feedforward), `gate` like up; `linear` makes them.
    activation is "gelu", "gelu_tanh", "relu", "relu_squared" or "silu". Input (*, d_model); the result has its shape.
    One fused operator while the leaves are plain; `unfused_because()` says why not, if not. recompute, which may be set
    at any time: the fused operator keeps no pre-activations for the backward (`functional.ffn`).
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        recompute: bool = False,
        device=None,
        dtype=None,
        linear: Callable[..., torch.nn.Linear] = torch.nn.Linear,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"FeedForward: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        check_probability("FeedForward", "dropout", dropout)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.up = linear(d_model, dim_feedforward, **options)
        self.gate = linear(d_model, dim_feedforward, **options) if gated else None
        self.down = linear(dim_feedforward, d_model, **options)
        self.activation = activation
        self.dropout = dropout
        self.recompute = recompute

    def unfused_because(self) -> str | None:
        gate = {} if self.gate is None else {"gate": self.gate}
        return touched(up=self.up, down=self.down, **gate)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: added to the result (`functional.ffn`)."""
        dropout_p = self.dropout if self.training else 0.0
        if self.unfused_because() is not None:
            act = ACTIVATIONS[self.activation]
            hidden = act(self.up(input)) if self.gate is None else act(self.gate(input)) * self.up(input)
            output = self.down(_torch.dropout(hidden, dropout_p, dropout_p > 0))
            return output if residual is None else residual + output
        return functional.ffn(
            input,
            self.up.weight,
            self.down.weight,
            b_up=self.up.bias,
            b_down=self.down.bias,
            w_gate=None if self.gate is None else self.gate.weight,
            b_gate=None if self.gate is None else self.gate.bias,
            residual=residual,
            activation=self.activation,
            dropout_p=dropout_p,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}, recompute={self.recompute}"
