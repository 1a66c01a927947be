"""Parts of a model in dtypes of their own, and the doors where hidden states change theirs.

An embedding, a layer or a head has one dtype, but for its norms, which may be float32 there (every norm takes float32
parameters beside 16-bit input). So hidden states change dtype where they enter such a part, and nowhere else; under
torch.autocast, where each operator casts for itself, not even there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from llmengine.nn.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from llmengine.models.transformer import Transformer

Policy = torch.dtype | Mapping[str, torch.dtype]
ALLOWED = (torch.float32, torch.bfloat16, torch.float16)
_HEADS = ("token_head", "pooler", "heads")
_LAYERS = re.compile(r"(?:(encoder|decoder)\.)?layers(?:\.(\d+)(?:-(\d+))?)?")
_EMBEDDINGS = re.compile(r"(?:(encoder|decoder)\.)?embeddings")


def apply(model: Transformer, policy: Policy) -> None:
    """Casts the parameters (`Transformer.to_dtype` tells what policy holds); ValueError, and no change, where it is
    not one."""
    if isinstance(policy, torch.dtype):
        model.to(policy)
        if model.token_head is not None:
            model.token_head.compute_dtype = None
        return
    chosen: dict[str, torch.dtype] = {}
    holders = (name for name, module in model.named_modules() if list(module.parameters(recurse=False)))
    parts = {name: _part(name) for name in holders}
    for name, dtype in sorted(policy.items(), key=lambda entry: _rank(entry[0])):
        if dtype not in ALLOWED:
            raise ValueError(f"to_dtype: {name!r} is {dtype!r}; allowed: {', '.join(map(str, ALLOWED))}")
        found = [place for place, part in parts.items() if _names(name, place, part, model)]
        tied_head = name == "head" and model.token_head is not None
        if not found and not tied_head and name != "default":
            raise ValueError(
                f"to_dtype: this model has no part {name!r}; parts: default, embeddings, head, norm, layers, layers.0, "
                'layers.0-1 (of the layers that it has), and "encoder." or "decoder." before embeddings and layers'
            )
        chosen |= dict.fromkeys(found, dtype)
    _check(model, parts, chosen)
    for place, dtype in chosen.items():
        # as Module.to does it: parameters stay the objects that they are, and their gradients come along
        model.get_submodule(place)._apply(lambda x, dtype=dtype: x.to(dtype) if x.is_floating_point() else x, False)
    if model.token_head is not None:
        head = model.token_head
        head.compute_dtype = policy.get("head", policy.get("default", head.compute_dtype))


def _rank(name: str) -> int:
    """What comes later wins."""
    return {"default": 0, "norm": 2}.get(name, 1)


def _part(place: str) -> str:
    """The part in which a module lies: the layer, "encoder.embeddings", "head", or what stands alone (a last norm)."""
    stack, _, rest = place.partition(".")
    if stack in _HEADS:
        return "head"
    if match := re.match(r"layers\.\d+", rest):
        return f"{stack}.{match[0]}"
    return f"{stack}.embeddings" if rest.startswith(("embeddings", "distance_buckets")) else place


def _names(name: str, place: str, part: str, model: Transformer) -> bool:
    """Whether a policy's name means the module at this place."""
    if name in ("default", "head"):
        return name in ("default", part)
    if name == "norm":
        return isinstance(model.get_submodule(place), LayerNorm | RMSNorm)
    stack, _, rest = part.partition(".")
    if match := _EMBEDDINGS.fullmatch(name):
        return rest == "embeddings" and match[1] in (None, stack)
    match = _LAYERS.fullmatch(name)
    if match is None or not rest.startswith("layers.") or match[1] not in (None, stack):
        return False
    first = 0 if match[2] is None else int(match[2])
    last = model.config.n_layers + model.config.decoder_layers if match[2] is None else int(match[3] or first)
    return first <= int(rest.removeprefix("layers.")) <= last


def _check(model: Transformer, parts: Mapping[str, str], chosen: Mapping[str, torch.dtype]) -> None:
    """Within a part all is of one dtype, or norms are float32."""
    seen: dict[str, torch.dtype] = {}
    norms: list[tuple[str, torch.dtype]] = []
    for place, part in parts.items():
        module = model.get_submodule(place)
        dtype = chosen.get(place, next(iter(module.parameters(recurse=False))).dtype)
        if isinstance(module, LayerNorm | RMSNorm):
            norms.append((place, dtype))
        elif dtype.is_floating_point and seen.setdefault(part, dtype) != dtype:
            raise ValueError(f"to_dtype: {part} would hold {seen[part]} and, in {place}, {dtype}")
    for place, dtype in norms:
        if dtype not in (torch.float32, seen.get(parts[place], dtype)):
            raise ValueError(
                f"to_dtype: {place} would be {dtype} in a part of {seen[parts[place]]}; a norm is of its part's dtype "
                "or float32"
            )


# ---- doors -----------------------------------------------------------------------------------------------------------


def into(leaf: Module, x: Tensor) -> Tensor:
    """x in the dtype of the first weight that it will meet."""
    weight = getattr(leaf, "weight", None)
    return as_dtype(x, weight.dtype) if isinstance(weight, Tensor) else x


def into_norm(norm: Module, x: Tensor) -> Tensor:
    """x as a norm takes it that belongs to no layer: float32 parameters suit all."""
    weight = getattr(norm, "weight", None)
    return x if weight is None or weight.dtype == torch.float32 else as_dtype(x, weight.dtype)


def into_head(head: Module, x: Tensor) -> Tensor:
    """x in the dtype of a head's parameters."""
    first = next(head.parameters(), None)
    return x if first is None else as_dtype(x, first.dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype or not dtype.is_floating_point or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)
