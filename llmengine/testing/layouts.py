"""Ways one tensor may lie in memory. A kernel must give the same answer for each, or refuse with a ValueError."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _padded(x: Tensor) -> Tensor:
    """Rows further apart than they are long, NaN between them."""
    if x.ndim == 0:
        return x
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan") if x.is_floating_point() else 1)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _offset(x: Tensor) -> Tensor:
    """Starts one element into its storage: unaligned for vector loads."""
    flat = x.new_empty(x.numel() + 1)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def _strided_last(x: Tensor) -> Tensor:
    if x.ndim == 0:
        return x
    wide = x.new_full((*x.shape, 2), float("nan") if x.is_floating_point() else 1)
    wide[..., 0] = x
    return wide[..., 0]


def _swapped(a: int, b: int) -> Callable[[Tensor], Tensor]:
    def layout(x: Tensor) -> Tensor:
        return x.transpose(a, b).contiguous().transpose(a, b) if x.ndim >= 2 else x.clone()

    return layout


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "padded rows": _padded,
    "storage offset": _offset,
    "strided last": _strided_last,
    "transposed last": _swapped(-1, -2),
    "transposed first": _swapped(0, 1),
    "huge stride": lambda x: _huge(x),
}


def _huge(x: Tensor) -> Tensor:
    """The first dimension's stride passes 2^31 elements: virtual memory, of which only the rows in use become real."""
    if x.ndim == 0 or not 2 <= x.shape[0] <= 8:
        return x.clone()
    row = x[0].numel()
    stride = 2**31 // (x.shape[0] - 1) + 8
    # not under poison(): it would touch every page
    storage = torch.empty(stride * (x.shape[0] - 1) + row, dtype=x.dtype, device=x.device)
    view = storage.as_strided(x.shape, (stride, *x[0].contiguous().stride()))
    return view.copy_(x)
