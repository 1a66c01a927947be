"""Blocks whose dropouts, sums and norms become one operator: BERT's output block, whole layers of BART and mBART."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmengine import functional
from llmengine.integrations.transformers.feed_forward import activation_name, dropout_p, normed_sum, part
from llmengine.integrations.transformers.stand_in import StandIn, noise, own_method, why_not_plain
from llmengine.nn.fusing import watched

SELF = ("self_attn", "self_attn_layer_norm")
CROSS = ("encoder_attn", "encoder_attn_layer_norm")
FEED_FORWARD = ("fc1", "fc2", "final_layer_norm")


def stand_ins(module: Any) -> Iterator[StandIn]:
    children = {name for name, _ in module.named_children()}
    if children == {"dense", "LayerNorm", "dropout"}:
        yield OUTPUT
    elif {*SELF, *FEED_FORWARD} <= children and (activation := activation_name(getattr(module, "activation_fn", None))):
        for norm_first in (False, True):
            yield (decoder_layer if {*CROSS} <= children else encoder_layer)(activation, norm_first)


# ---- BERT: dense, dropout, residual, norm ----------------------------------------------------------------------------


def output_block(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    if why_not_plain(LayerNorm=self.LayerNorm, dropout=self.dropout):
        return own_method(self, "forward")(hidden_states, input_tensor)
    return normed_sum(self.dense(hidden_states), input_tensor, self.LayerNorm, dropout_p(self, "dropout"))


def _output_probe(module: Any) -> tuple[Tensor, Tensor]:
    width, hidden = module.dense.weight.shape
    return noise(module, 1, 3, hidden), noise(module, 1, 3, width, seed=1)


# ---- BART: attention, cross attention, feed-forward, each with residual and norm (mBART, Pegasus: the norm first) ----


@functools.cache
def encoder_layer(activation: str, norm_first: bool) -> StandIn:
    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options) -> Tensor:
        if hidden_states.dtype == torch.float16 or _why_not(self):  # float16 layers clamp what overflows
            return own_method(self, "forward")(hidden_states, attention_mask, **options)
        steps = [
            (self.self_attn_layer_norm, lambda x: self.self_attn(x, attention_mask=attention_mask, **options)[0]),
            (self.final_layer_norm, lambda x: _feed_forward(self, x, activation)),
        ]
        return _walk(hidden_states, steps, dropout_p(self, "dropout"), norm_first)

    return StandIn(_what("encoder", activation, norm_first), "forward", forward, _encoder_probe, _why_not)


@functools.cache
def decoder_layer(activation: str, norm_first: bool) -> StandIn:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *more,
        **options,  # the cache too, by whatever name this version of Transformers gives it
    ) -> Tensor:
        if more or hidden_states.dtype == torch.float16 or _why_not(self):
            return own_method(self, "forward")(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, *more, **options
            )
        options.pop("use_cache", None)
        memory = {"key_value_states": encoder_hidden_states, "attention_mask": encoder_attention_mask} | options
        steps = [
            (self.self_attn_layer_norm, lambda x: self.self_attn(x, attention_mask=attention_mask, **options)[0]),
            (self.encoder_attn_layer_norm, lambda x: self.encoder_attn(x, **memory)[0]),
            (self.final_layer_norm, lambda x: _feed_forward(self, x, activation)),
        ]
        if encoder_hidden_states is None:
            del steps[1]
        return _walk(hidden_states, steps, dropout_p(self, "dropout"), norm_first)

    return StandIn(_what("decoder", activation, norm_first), "forward", forward, _decoder_probe, _why_not)


def _what(kind: str, activation: str, norm_first: bool) -> str:
    return f"{kind} layer ({activation}, norms {'before the blocks' if norm_first else 'after the sums'})"


def _walk(x: Tensor, steps: list[tuple[Any, Callable[[Tensor], Tensor]]], p: float, norm_first: bool) -> Tensor:
    """x = norm(x + dropout(block(x))), step by step; or x + dropout(block(norm(x))), where each sum is taken together
    with the norm that opens the next block."""
    if not norm_first:
        for norm, block in steps:
            x = normed_sum(block(x), x, norm, p)
        return x
    norms, blocks = zip(*steps, strict=True)
    normed = norms[0](x)
    for block, norm in zip(blocks[:-1], norms[1:], strict=True):
        normed, x = functional.add_layer_norm(
            block(normed), x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=p
        )
    return x + torch.nn.functional.dropout(blocks[-1](normed), p, p > 0)


def _why_not(self: Any) -> str | None:
    activation = self.activation_fn
    if isinstance(activation, Module) and (reason := watched("activation_fn", activation)) is not None:
        return reason
    names = (*FEED_FORWARD, SELF[1], *((CROSS[1],) if hasattr(self, CROSS[1]) else ()))
    return why_not_plain(**{name: part(self, name) for name in names})


def _feed_forward(self: Any, hidden_states: Tensor, activation: str) -> Tensor:
    return functional.ffn(
        hidden_states, self.fc1.weight, self.fc2.weight, b_up=self.fc1.bias, b_down=self.fc2.bias,
        activation=activation, dropout_p=dropout_p(self, "activation_dropout"),
    )  # fmt: skip


def _encoder_probe(module: Any) -> tuple[Tensor, None]:
    return noise(module, 1, 3, module.fc1.weight.shape[1]), None


def _decoder_probe(module: Any) -> tuple[Tensor, None, Tensor, None]:
    return *_encoder_probe(module), noise(module, 1, 4, module.fc1.weight.shape[1], seed=1), None


OUTPUT = StandIn("dense layer with residual and norm", "forward", output_block, _output_probe)
