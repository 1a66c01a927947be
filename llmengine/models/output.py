"""What a Transformer returns: Hugging Face's names; attribute, key and index access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from llmengine.models.memory import Memory

FIELDS = {
    "loss": "(): the weighted sum of losses; None without labels",
    "losses": "{objective: ()}",
    "logits": "of the token head (*input_ids.shape, vocab_size), or of the first other head; = prediction_logits",
    "seq_relationship_logits": "(sequences, 2), of nsp; sop_logits of sop",
    "sop_logits": "(sequences, 2)",
    "start_logits": "(batch, length), of qa; end_logits alike",
    "end_logits": "(batch, length)",
    "head_logits": "{objective: logits} of all heads but the token head",
    "last_hidden_state": "(*input_ids.shape, d_model), of the decoder where there is one",
    "pooler_output": "(sequences, d_model)",
    "hidden_states": "(*input_ids.shape, d_model) for the embeddings and after each layer, as last_hidden_state",
    "encoder_last_hidden_state": "(*input_ids.shape, d_model), of an encoder-decoder",
    "replaced": "like input_ids, 1 where ELECTRA's generator put another token, else 0, -100 at padding",
    "mems": "of XLNet: for each layer (length, batch, d_model); a Memory where the batch was packed or padded",
    "encoder_hidden_states": "as hidden_states, of an encoder-decoder's encoder",
}
ALIASES = {"prediction_logits": "logits"}


class TransformerOutput:
    """Attributes (None where not asked for, or the model has no such head) and their shapes are in `FIELDS`. Padding
    holds zeros.

    What the loss did not need is computed at first access: logits beside labels, and hidden states in the caller's
    padded shape. Keys are those of the Hugging Face model with the same heads; out[0] and out[1:] index their values.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    logits: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor | None
    sop_logits: Tensor | None
    start_logits: Tensor | None
    end_logits: Tensor | None
    head_logits: dict[str, Tensor]
    last_hidden_state: Tensor | None
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    encoder_last_hidden_state: Tensor | None
    encoder_hidden_states: tuple[Tensor, ...] | None
    replaced: Tensor | None
    mems: list[Tensor] | Memory | None

    def __init__(self, keyed: dict[str, Any], others: dict[str, Any]) -> None:
        """Both map FIELDS to values, to None, or to functions that compute the value when it is asked for."""
        self._keyed = {name: value for name, value in keyed.items() if value is not None}
        self._others = others

    def __getattr__(self, name: str) -> Any:
        name = ALIASES.get(name, name)
        if name not in FIELDS:
            raise AttributeError(f"TransformerOutput has no {name}; fields: {', '.join([*FIELDS, *ALIASES])}")
        store = self._keyed if name in self._keyed else self._others
        if callable(store.get(name)):
            store[name] = store[name]()
        return store.get(name)

    def with_loss(self, loss: Tensor, losses: dict[str, Tensor]) -> TransformerOutput:
        """The same with another loss."""
        return TransformerOutput({**self._keyed, "loss": loss}, {**self._others, "losses": losses})

    def keys(self) -> list[str]:
        both = "seq_relationship_logits" in self._keyed or "sop_logits" in self._keyed
        return ["prediction_logits" if both and name == "logits" else name for name in self._keyed]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        names = self.keys()[key]
        return getattr(self, names) if isinstance(names, str) else tuple(getattr(self, name) for name in names)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        name = ALIASES.get(key, key)
        return name in self._keyed or self._others.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        """Keys, as a Hugging Face output (a dict) iterates."""
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._keyed)

    def __repr__(self) -> str:
        return f"TransformerOutput({', '.join(self.keys())})"


# wrappers such as FSDP look for the tensors of an output
_pytree.register_pytree_node(
    TransformerOutput, lambda out: ([out._keyed, out._others], None), lambda parts, _: TransformerOutput(*parts)
)


def in_this_mode(device: str, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`compute` as if it were called now: with the gradient and autocast modes of this moment."""
    grad, enabled, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def later() -> Tensor:
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype=dtype, enabled=enabled):
            return compute()

    return later
