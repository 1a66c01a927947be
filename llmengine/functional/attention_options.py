"""What attention's operators do to scores, checked and as kernels take it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmengine.functional.arguments import check_float, check_tensor, short

UNBOUNDED = (-1, -1)


def slopes_of(op: str, slopes: Tensor | None, query: Tensor, batch: int, what: str) -> Tensor | None:
    """ALiBi slopes as (batch or sequences, heads), in the scores' dtype."""
    if slopes is None:
        return None
    check_float(op, "alibi_slopes", slopes)
    heads = query.shape[1]
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes has shape {tuple(slopes.shape)}; expected ({heads},), one per query head, or "
            f"({batch}, {heads}) ({what}, heads)"
        )
    return slopes.detach().to(torch.promote_types(query.dtype, torch.float32)).expand(batch, heads)


def distance_bias_of(op: str, bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The bias by distance, in the scores' dtype."""
    if bias is None:
        return None
    _check_learned(op, "distance_bias", bias, query)
    heads = query.shape[1]
    if bias.ndim != 2 or bias.shape[0] != heads or bias.shape[1] % 2 != 1:
        raise ValueError(
            f"{op}: distance_bias has shape {tuple(bias.shape)}; expected ({heads}, 2 M + 1): the distances -M ... M "
            "of each query head"
        )
    return bias.to(torch.promote_types(query.dtype, torch.float32))


def sinks_of(op: str, sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """The sinks, in the scores' dtype."""
    if sinks is None:
        return None
    _check_learned(op, "sinks", sinks, query)
    heads = query.shape[1]
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"{op}: sinks has shape {tuple(sinks.shape)}; expected ({heads},), one per query head")
    return sinks.to(torch.promote_types(query.dtype, torch.float32))


def _check_learned(op: str, argument: str, tensor: Tensor, query: Tensor) -> None:
    check_tensor(op, argument, tensor)
    if tensor.dtype not in (torch.float32, query.dtype):
        allowed = ", ".join(dict.fromkeys((short(query.dtype), "float32")))
        raise ValueError(f"{op}: {argument} has dtype {short(tensor.dtype)}; allowed: {allowed}")


def sides_of(op: str, window_size: Sequence[int]) -> tuple[int, int]:
    """A window's (left, right)."""
    if window_size is UNBOUNDED:
        return UNBOUNDED
    if not (isinstance(window_size, Sequence) and len(window_size) == 2 and all(w >= -1 for w in window_size)):
        raise ValueError(
            f"{op}: window_size must be (left, right), each at least 0 or -1 (unbounded), got {window_size}"
        )
    left, right = (int(w) for w in window_size)
    return left, right


def scale_and_cap(op: str, scale: float | None, softcap: float, head_dim: int) -> tuple[float, float]:
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    for name, number, low in (("scale", scale, -math.inf), ("softcap", softcap, 0.0)):
        if not (abs(number) < math.inf and number >= low):  # not isfinite: see cross_entropy.check_options
            raise ValueError(f"{op}: {name} must be finite{' and at least 0' if low == 0 else ''}, got {number}")
    return scale, float(softcap)
