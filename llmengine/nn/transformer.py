"""TransformerEncoderLayer and TransformerDecoderLayer: torch.nn's layers, fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, Module

from llmengine import functional
from llmengine.nn.attention import MultiheadAttention
from llmengine.nn.fusing import add_norm, touched
from llmengine.nn.norm import LayerNorm

_torch = torch.nn.functional


class _Layer(Module):
    """What encoder and decoder layers share: residual steps around a norm, and the feed-forward block.

    Submodules are made in torch.nn's order, so that a seed gives the weights that it gives there.
    """

    linear1: Linear
    dropout: Dropout
    linear2: Linear
    norm_first: bool
    activation: Callable[[Tensor], Tensor]

    def _residual(self, x: Tensor, block: Callable[[Tensor], Tensor], norm: Module, dropout: Dropout) -> Tensor:
        """Post-LN: norm(x + dropout(block(x))); pre-LN: x + dropout(block(norm(x)))."""
        if self.norm_first:
            return x + dropout(block(norm(x)))
        if touched(dropout=dropout) is not None:
            return norm(x + dropout(block(x)))
        return add_norm(block(x), x, norm, dropout.p if self.training else 0.0)[0]

    def _feed_forward_step(self, x: Tensor, norm: Module, dropout: Dropout) -> Tensor:
        """`_residual` of the feed-forward block, which itself adds what no dropout keeps it from."""
        drops = (self.training and dropout.p > 0) or touched(dropout=dropout) is not None
        if drops or not self.norm_first:
            return self._residual(x, self._feed_forward, norm, dropout)
        return self._feed_forward(norm(x), x)

    def _feed_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fused_activation = activation_name(self.activation)
        if fused_activation is None or self.unfused_because() is not None:
            output = self.linear2(self.dropout(self.activation(self.linear1(x))))
            return output if residual is None else residual + output
        return functional.ffn(
            x,
            self.linear1.weight,
            self.linear2.weight,
            b_up=self.linear1.bias,
            b_down=self.linear2.bias,
            residual=residual,
            activation=fused_activation,
            dropout_p=self.dropout.p if self.training else 0.0,
        )

    def unfused_because(self) -> str | None:
        """Why the feed-forward block runs leaf by leaf instead of as one fused operator, or None if it is fused."""
        if activation_name(self.activation) is None:
            return f"activation {self.activation!r} has no fused kernel"
        return touched(linear1=self.linear1, dropout=self.dropout, linear2=self.linear2)


class TransformerEncoderLayer(_Layer):
    """torch.nn.TransformerEncoderLayer: same constructor, state_dict, masks and results; see there.

    Nested tensors are not supported: pad, or use `llmengine.Transformer`, which computes no padding.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = _torch.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first, **place)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, **place)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **place)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.activation = activation_function(type(self).__name__, activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal)[0]

        x = self._residual(src, attend, self.norm1, self.dropout1)
        return self._feed_forward_step(x, self.norm2, self.dropout2)


class TransformerDecoderLayer(_Layer):
    """torch.nn.TransformerDecoderLayer: same constructor, state_dict, masks and results; see there."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = _torch.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first, **place)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first, **place)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, **place)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **place)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
        self.norm3 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.dropout3 = Dropout(dropout)
        self.activation = activation_function(type(self).__name__, activation)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, x, x, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal)[0]

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x, memory, memory, memory_key_padding_mask, False, memory_mask, is_causal=memory_is_causal
            )[0]

        x = self._residual(tgt, attend, self.norm1, self.dropout1)
        x = self._residual(x, attend_memory, self.norm2, self.dropout2)
        return self._feed_forward_step(x, self.norm3, self.dropout3)


def activation_function(module: str, activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """torch.nn's argument: "relu", "gelu", or any function of one tensor."""
    if callable(activation):
        return activation
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": _torch.relu, "gelu": _torch.gelu}
    if activation not in functions:
        raise ValueError(f"{module}: activation {activation!r} is not one of {', '.join(functions)}, nor a function")
    return functions[activation]


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The fused operator's name for an activation, or None where it has none."""
    if isinstance(activation, Module):
        if type(activation) is torch.nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
        return {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}.get(type(activation))
    for function, name in ((_torch.relu, "relu"), (torch.relu, "relu"), (_torch.gelu, "gelu"), (_torch.silu, "silu")):
        if activation is function:
            return name
    return None
