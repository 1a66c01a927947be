"""Checks of a batch at the model's door. Values are read only where that costs no synchronisation: on CPU, eagerly."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.models.config import TransformerConfig
from llmengine.models.layout import IGNORED, Layout, Packed, Padded, dense, unpadded

INTEGERS = (torch.int64, torch.int32)


def readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def layout_of(
    config: TransformerConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Layout:
    """Checks what describes the batch's shape and returns its layout."""
    _integers("input_ids", input_ids)
    if input_ids.numel() == 0:
        raise ValueError(f"Transformer: input_ids is empty, shape {tuple(input_ids.shape)}")
    _range("input_ids", input_ids, config.vocab_size, "vocab_size")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("Transformer: give attention_mask or cu_seqlens, not both: packed batches have no padding")
        return _packed(config, input_ids, cu_seqlens, max_seqlen)
    if max_seqlen is not None:
        raise ValueError("Transformer: max_seqlen belongs to cu_seqlens, which was not given")
    if input_ids.dim() != 2:
        raise ValueError(
            f"Transformer: input_ids has shape {tuple(input_ids.shape)}; expected (batch, length), "
            "or (tokens,) or (1, tokens) with cu_seqlens"
        )
    _length(config, input_ids.shape[1], "input_ids")
    if attention_mask is None:
        return dense(input_ids.shape, input_ids.device, config.causal)
    _attention_mask(attention_mask, input_ids)
    if torch.compiler.is_compiling():
        return Padded(attention_mask, config.causal)
    return unpadded(attention_mask, config.causal)


def check_like(name: str, x: Tensor | None, input_ids: Tensor, below: int, limit: str, *, label: bool = False) -> None:
    """A tensor of ids (or labels: IGNORED too) beside input_ids."""
    if x is None:
        return
    _integers(name, x)
    if x.shape != input_ids.shape:
        raise ValueError(
            f"Transformer: {name} has shape {tuple(x.shape)}; expected that of input_ids, {tuple(input_ids.shape)}"
        )
    if x.device != input_ids.device:
        raise ValueError(f"Transformer: {name} is on {x.device} but input_ids on {input_ids.device}")
    _range(name, x, below, limit, label=label)


def check_sequence_labels(name: str, x: Tensor, sequences: int, classes: int) -> Tensor:
    """Labels of whole sequences, (sequences,) or (sequences, 1), flattened."""
    _integers(name, x)
    if tuple(x.shape) not in ((sequences,), (sequences, 1)):
        raise ValueError(f"Transformer: {name} has shape {tuple(x.shape)}; expected ({sequences},), one per sequence")
    _range(name, x, classes, "number of classes", label=True)
    return x.flatten()


def denominators(num_items_in_batch: Tensor | int | dict | None, heads: list[str]) -> dict[str, Tensor | int]:
    """num_items_in_batch as {"tokens": n, "sequences": m}; empty: each loss is the mean over its own labels."""
    if num_items_in_batch is None:
        return {}
    if isinstance(num_items_in_batch, dict):
        needed = {{"nsp": "sequences"}.get(head, "tokens") for head in heads}
        if missing := needed - set(num_items_in_batch):
            raise ValueError(f"Transformer: num_items_in_batch lacks {sorted(missing)}, which {heads} need")
        return num_items_in_batch
    if "nsp" in heads and len(heads) > 1:
        raise ValueError(
            'Transformer: num_items_in_batch must be a dict {"tokens": labelled tokens, "sequences": labelled pairs} '
            f"where losses count different things: {heads}"
        )
    return {"tokens": num_items_in_batch, "sequences": num_items_in_batch}


def _packed(config: TransformerConfig, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Packed:
    if input_ids.dim() > 2 or (input_ids.dim() == 2 and input_ids.shape[0] != 1):
        raise ValueError(
            f"Transformer: input_ids has shape {tuple(input_ids.shape)}; with cu_seqlens: (tokens,) or (1, tokens)"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        given = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
        raise ValueError(f"Transformer: cu_seqlens must be an int32 tensor (sequences + 1,), got {given}")
    if len(cu_seqlens) < 2:
        raise ValueError("Transformer: cu_seqlens holds no sequence; expected its starts and the end of the last one")
    tokens = input_ids.numel()
    if torch.compiler.is_compiling():
        return Packed(input_ids.shape, cu_seqlens, tokens if max_seqlen is None else max_seqlen, config.causal)
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None or readable(cu_seqlens) else max_seqlen
    if readable(cu_seqlens):
        first, last, shortest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(cu_seqlens.diff().min())
        if first != 0 or last != tokens or shortest < 1:
            raise ValueError(
                f"Transformer: cu_seqlens must rise from 0 to the number of tokens ({tokens}); "
                f"it starts at {first}, ends at {last}, and its smallest step is {shortest}"
            )
        if max_seqlen is not None and longest > max_seqlen:
            raise ValueError(f"Transformer: max_seqlen is {max_seqlen}, but cu_seqlens has a sequence of {longest}")
    _length(config, longest, "cu_seqlens")
    return Packed(input_ids.shape, cu_seqlens, longest, config.causal)


def _attention_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        given = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"Transformer: attention_mask is {given}; expected {tuple(input_ids.shape)} of 0 and 1")
    if attention_mask.device != input_ids.device:
        raise ValueError(f"Transformer: attention_mask is on {attention_mask.device}, input_ids on {input_ids.device}")
    if not readable(attention_mask):
        return
    if attention_mask.dtype != torch.bool and not ((attention_mask == 0) | (attention_mask == 1)).all():
        wrong = attention_mask[(attention_mask != 0) & (attention_mask != 1)][0].item()
        raise ValueError(f"Transformer: attention_mask must hold 0 (padding) and 1 only, got {wrong}")
    empty = (~attention_mask.bool().any(1)).nonzero()
    if len(empty):
        raise ValueError(f"Transformer: attention_mask has no token in row {int(empty[0])}; leave empty rows out")


def _integers(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Transformer: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INTEGERS:
        raise ValueError(f"Transformer: {name} has dtype {x.dtype}; allowed: int64, int32")


def _range(name: str, x: Tensor, below: int, limit: str, *, label: bool = False) -> None:
    if not readable(x) or x.numel() == 0:
        return
    low, high = (int(bound) for bound in x.aminmax())
    if label and low < 0:
        negative = x[(x < 0) & (x != IGNORED)]
        low = int(negative.min()) if len(negative) else 0
    if low < 0 or high >= below:
        wrong = low if low < 0 else high
        also = f", or {IGNORED} for no loss" if label else ""
        raise ValueError(f"Transformer: {name} holds {wrong}; allowed: 0 to {below - 1} ({limit} {below}){also}")


def _length(config: TransformerConfig, length: int, source: str) -> None:
    if length > config.max_positions:
        raise ValueError(
            f"Transformer: {source} has a sequence of {length} tokens; max_positions is {config.max_positions}"
        )
