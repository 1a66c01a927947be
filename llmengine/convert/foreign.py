"""Checkpoints of other toolkits that are one file: what all of their readers share.

Such a file is a pickle, which may ask for any code to be run. Nothing of the kind happens here: PyTorch's restricted
reader makes tensors and plain values only, and argparse.Namespace, in which these toolkits keep their options.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmengine.convert.family import Family, unless_equal


@dataclass(frozen=True)
class Foreign:
    """A file that was read: `fields` for TransformerConfig, and tensors under the names that `family` gives them."""

    family: Family
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def unpickle(path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors, plain values and Namespaces; ValueError otherwise."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types: what the bytes happen to look like
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is neither a GGUF file nor one that torch.save wrote") from None
        raise ValueError(
            f"{path} holds a {refused[1]}, which would run code to be read; load the file where it was made and save "
            "a copy of tensors and plain values only"
        ) from None


def renamed(tensors: Mapping[str, Tensor], names: Iterable[tuple[str, str]], skipped: str) -> dict[str, Tensor]:
    """With each pattern of `names` replaced in turn, and without the tensors whose own name matches `skipped`."""
    result = {}
    for name, tensor in tensors.items():
        if not re.search(skipped, name):
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor
    return result


def depth(tensors: Iterable[str], layers: str) -> int:
    """How many layers there are whose tensors' names begin with "`layers`.0.", "`layers`.1.", …"""
    numbers = [int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(layers)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


# ---- what is refused -------------------------------------------------------------------------------------------------


def demand(toolkit: str, options: Mapping[str, Any], demanded: Mapping[str, tuple]) -> None:
    """Options that change the mathematics must have one of these values; the first stands for a missing one."""
    for name, allowed in demanded.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{toolkit} checkpoint: {name} is {options[name]!r}; llmengine computes only "
                + " or ".join(map(repr, allowed))
            )


def of_both(toolkit: str, what: str, encoder: Any, decoder: Any) -> Any:
    """What must be the same on both sides of our encoder-decoder."""
    if encoder != decoder:
        raise ValueError(f"{toolkit} checkpoint: {what} is {encoder!r} in the encoder and {decoder!r} in the decoder")
    return encoder


def words_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fields of the word embeddings, by Hugging Face's names of them. One that source and target share also gets its
    name there."""
    encoder, decoder = (tensors[f"model.{side}.embed_tokens.weight"] for side in ("encoder", "decoder"))
    head = tensors.get("lm_head.weight")
    fields: dict[str, Any] = {
        "vocab_size": decoder.shape[0],
        "d_model": decoder.shape[1],
        "tie_embeddings": head is None or torch.equal(head, decoder),
    }
    if torch.equal(encoder, decoder):
        tensors["model.shared.weight"] = encoder
        return fields
    return fields | {"share_embeddings": False, "encoder_vocab_size": unless_equal(len(encoder), len(decoder))}
