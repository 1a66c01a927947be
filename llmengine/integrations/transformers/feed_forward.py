"""Feed-forward blocks: two linear layers about an activation, three where a gate joins them, as one operator.

Families differ in the names of the leaves, in where the dropouts are, and in whether up and gate lie in one matrix.
That is all that a `Block` holds; another family is another line of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from llmengine import functional
from llmengine.integrations.transformers.stand_in import StandIn, noise, own_method, why_not_plain
from llmengine.nn.feed_forward import ACTIVATIONS
from llmengine.nn.fusing import watched


@dataclass(frozen=True)
class Block:
    """Names, dotted where they lie deeper: output_dropout(down(hidden_dropout(act(gate(x)) * up(x))))."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    joint: bool = False  # up's matrix holds the gate's rows, then up's
    hidden_dropout: str | None = None  # a Dropout, or a number
    output_dropout: str | None = None
    norm: str | None = None  # norm(x + the above)
    method: str = "forward"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Whose parameters or rates the operator reads instead of calling them."""
        own = (self.up, self.down, self.gate, self.norm, self.hidden_dropout, self.output_dropout)
        return tuple(name for name in own if name is not None)

    @property
    def passed_over(self) -> tuple[str, ...]:
        """What else is not called: the activation, and the modules in which leaves lie."""
        return tuple(dict.fromkeys([self.activation, *(n.rpartition(".")[0] for n in self.leaves if "." in n)]))


BLOCKS = (
    Block("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn", output_dropout="output.dropout",
          norm="output.LayerNorm", method="feed_forward_chunk"),  # BERT, RoBERTa, ELECTRA, ...
    Block("ffn", "ffn_output", "activation", method="ff_chunk"),  # ALBERT
    Block("c_fc", "c_proj", "act", output_dropout="dropout"),  # GPT-2, GPT-Neo
    Block("c_fc", "c_proj", "act", output_dropout="residual_dropout"),  # StarCoder2
    Block("lin1", "lin2", "activation", output_dropout="dropout", method="ff_chunk"),  # DistilBERT
    Block("layer_1", "layer_2", "activation_function", hidden_dropout="dropout", output_dropout="dropout",
          norm="layer_norm"),  # XLNet
    Block("fc_in", "fc_out", "act", output_dropout="dropout"),  # GPT-J
    Block("dense_h_to_4h", "dense_4h_to_h", "act"),  # GPT-NeoX
    Block("fc1", "fc2", "activation_fn"),  # Phi, CLIP
    Block("wi", "wo", "act", hidden_dropout="dropout"),  # T5
    Block("wi_1", "wo", "act", gate="wi_0", hidden_dropout="dropout"),  # T5 1.1, mT5, UMT5
    Block("up_proj", "down_proj", "act_fn", gate="gate_proj"),  # Llama, Mistral, Qwen, Gemma, ...
    Block("up_proj", "down_proj", "activation_fn", gate="gate_proj"),  # Llama 4's dense and shared blocks
    Block("gate_up_proj", "down_proj", "activation_fn", joint=True),  # Phi-3
    Block("Wi", "Wo", "act", joint=True, hidden_dropout="drop"),  # ModernBERT
)  # fmt: skip


def stand_ins(module: Any) -> Iterator[StandIn]:
    for block in BLOCKS:
        has_all = all(part(module, name) is not None for name in (block.method, *block.leaves, *block.passed_over))
        if has_all and (activation := activation_name(part(module, block.activation))) is not None:
            yield stand_in(block, activation)


def part(module: Any, name: str) -> Any:
    """An attribute by its dotted name, or None."""
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def activation_name(function: object) -> str | None:
    """The fused operator's name for an activation, by its values: libraries write the same function many times."""
    if not callable(function) or (isinstance(function, Module) and next(function.parameters(), None) is not None):
        return None
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    try:
        values = function(x)
        same = (name for name, ours in ACTIVATIONS.items() if torch.allclose(values, ours(x), rtol=0, atol=1e-7))
        return next(same, None)
    except Exception:  # not a function of one tensor to one tensor
        return None


@functools.cache
def stand_in(block: Block, activation: str) -> StandIn:
    def feed_forward(self: Any, hidden_states: Tensor) -> Tensor:
        return _run(self, hidden_states, block, activation)

    def probe(module: Any) -> tuple[Tensor]:
        return (noise(module, 1, 3, weight_of(part(module, block.down)).shape[0]),)

    norm = "" if block.norm is None else ", residual and norm"
    form = f"{activation}{', gated' if block.joint or block.gate else ''}{norm}"
    return StandIn(
        f"feed-forward block ({form})", block.method, feed_forward, probe, lambda module: _why_not(module, block)
    )


def _why_not(module: Any, block: Block) -> str | None:
    """Why this call must go the module's own way, or None."""
    for name in block.passed_over:
        other = part(module, name)
        if isinstance(other, Module) and (reason := watched(name, other)) is not None:
            return reason
    leaves = {name: part(module, name) for name in block.leaves}
    return why_not_plain(**{name: leaf for name, leaf in leaves.items() if isinstance(leaf, Module)})


def _run(self: Any, x: Tensor, block: Block, activation: str) -> Tensor:
    if _why_not(self, block):
        return own_method(self, block.method)(x)
    up, down = part(self, block.up), part(self, block.down)
    gate = None if block.gate is None else part(self, block.gate)
    w_up, b_up = weight_of(up), up.bias
    w_gate, b_gate = (None, None) if gate is None else (weight_of(gate), gate.bias)
    if block.joint:
        w_gate, w_up = w_up.chunk(2)
        b_gate, b_up = (None, None) if b_up is None else b_up.chunk(2)
    output = functional.ffn(
        x, w_up, weight_of(down), b_up=b_up, b_down=down.bias, w_gate=w_gate, b_gate=b_gate,
        activation=activation, dropout_p=dropout_p(self, block.hidden_dropout),
    )  # fmt: skip
    p = dropout_p(self, block.output_dropout)
    if block.norm is not None:
        return normed_sum(output, x, part(self, block.norm), p)
    return output if p == 0 else torch.nn.functional.dropout(output, p)


def weight_of(leaf: Any) -> Tensor:
    """As nn.Linear holds it, (out, in); GPT-2's Conv1D has it transposed."""
    return leaf.weight.t() if isinstance(leaf, Conv1D) else leaf.weight


def dropout_p(module: Any, name: str | None) -> float:
    """The rate at which to drop now, of a Dropout or a number of that name."""
    if name is None:
        return 0.0
    dropout: Any = part(module, name)
    if isinstance(dropout, Module):
        module, dropout = dropout, dropout.p
    return dropout if module.training else 0.0


def normed_sum(branch: Tensor, residual: Tensor, norm: torch.nn.LayerNorm, p: float) -> Tensor:
    """norm(residual + dropout(branch))."""
    return functional.add_layer_norm(
        branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=p
    )[0]
