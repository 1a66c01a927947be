"""Cross-entropy against class indices, with what language models add: a softcap on the logits and a z-loss."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from llmengine.functional.arguments import check_float, check_same_device, check_tensor, flat, needs_grad, short
from llmengine.ops import cross_entropy as ops

INDICES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """The cross-entropy of softmax(z) against class indices, as `torch.nn.functional.cross_entropy`.

    With z = input, or softcap tanh(input / softcap) where softcap > 0 (Gemma 2), lse = log sum_c exp(z_c), weights w
    (1 without `weight`) and e = label_smoothing, a token of class y has the loss
        (1 - e) w_y (lse - z_y) + e / C sum_c w_c (lse - z_c) + z_loss lse^2
    (smoothing: Szegedy et al. 2016; z-loss: PaLM). A token of class ignore_index has loss 0 and no gradient. "mean"
    divides the sum of the losses, z-loss included, by the sum of w_y over the other tokens.

    num_items: what "mean" and "sum" divide the sum of the losses by instead, where this call has a part of a step's
    tokens (micro-batches, processes' own): the count of labels, or the sum of w_y, of the whole step, whose mean the
    calls' losses and gradients then add up to. A number, or a tensor of one; on input's device nothing waits for it.
    Of 0 items the sum is not divided: over no labels it is 0.

    Shapes: input (C,), (N, C) or (N, C, d1, ...), target without C: (), (N,) or (N, d1, ...); weight (C,), in input's
    dtype or float32, a constant. The result is () or, for reduction "none", like target; it is float32, also for
    16-bit logits (PyTorch rounds the loss to their dtype), or float64 for float64. Logits are best laid out with C
    last; others are copied.

    Differences from PyTorch: a mean over no labels is 0 with zero gradients (PyTorch: NaN); targets are indices alone.
    -inf logits are classes that cannot be; a token whose logits are all -inf, or hold NaN or +inf, gives NaN.
    Raises ValueError on shapes, dtypes, devices or options that do not fit, and on the CPU for a target out of range.
    """
    op = "cross_entropy"
    check_float(op, "input", input)
    check_options(op, reduction, label_smoothing, z_loss, softcap)
    check_num_items(op, num_items, reduction)
    if input.ndim == 0:
        raise ValueError(f"{op}: input has shape (); expected (C,), (N, C) or (N, C, d1, ...)")
    shape = tuple(input.shape)
    classes = shape[0 if len(shape) == 1 else 1]
    expected = () if len(shape) == 1 else (*shape[:1], *shape[2:])
    target = check_targets(op, target, expected, ignore_index)
    check_weight(op, weight, classes, input)
    check_same_device(op, input=input, target=target, weight=weight)
    if classes == 0 and target.numel():
        raise ValueError(f"{op}: input of shape {tuple(input.shape)} has no classes")
    last = input if len(shape) <= 2 else input.movedim(1, -1)
    rows = last if len(shape) == 2 else last.reshape(math.prod(expected), classes)
    args = (
        rows, flat(target), None if weight is None else weight.detach(), reduction if num_items is None else "sum",
        int(ignore_index), float(label_smoothing), float(z_loss), float(softcap),
    )  # fmt: skip
    loss = ops.CrossEntropy.apply(*args) if needs_grad(rows) else ops.cross_entropy_forward(*args)[0]
    if num_items is not None:
        return divide(loss, num_items)
    return loss.view(expected) if reduction == "none" and len(expected) != 1 else loss


# ---- checks shared with linear_cross_entropy -------------------------------------------------------------------------


def check_options(op: str, reduction: str, label_smoothing: float, z_loss: float, softcap: float) -> None:
    if reduction not in ops.REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; allowed: {', '.join(map(repr, ops.REDUCTIONS))}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    for name, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0.0 <= value < math.inf:  # not math.isfinite, which torch.compile cannot ask of what may vary
            raise ValueError(f"{op}: {name} must be finite and at least 0 (0: none), got {value}")


def check_num_items(op: str, num_items: Tensor | float | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction == "none":
        raise ValueError(f"{op}: num_items is given and reduction is 'none'; allowed with it: 'mean', 'sum'")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.dtype == torch.bool or num_items.is_complex():
            raise ValueError(
                f"{op}: num_items is {short(num_items.dtype)} {tuple(num_items.shape)}; expected one real number"
            )
    elif isinstance(num_items, bool) or not isinstance(num_items, numbers.Real):  # NumPy's, too
        raise TypeError(f"{op}: num_items must be a number or a tensor of one, got {type(num_items).__name__}")
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"{op}: num_items must be finite and at least 0, got {num_items}")


def divide(total: Tensor, num_items: Tensor | float) -> Tensor:
    """total / num_items, a constant; total where that is 0, as a step's count of labels may be."""
    if isinstance(num_items, Tensor):
        items = num_items.detach().reshape(()).to(total.dtype)
        if items.device.type != "cpu":  # which would be copied to a GPU while the host waits
            items = items.to(total.device)
        return total / (items + (items == 0))
    return total / ((num_items if isinstance(num_items, int) else float(num_items)) or 1)


def check_targets(op: str, target: Tensor, expected: tuple[int, ...], ignore_index: int) -> Tensor:
    """The target as int64. Whether its values are in range, the kernels say: here it would cost a pass and a wait."""
    check_tensor(op, "target", target)
    if target.dtype not in INDICES:
        if target.is_floating_point():
            raise ValueError(
                f"{op}: target has dtype {short(target.dtype)}: class probabilities are not supported; give class "
                "indices (int64), or use torch.nn.functional.cross_entropy"
            )
        allowed = ", ".join(map(short, INDICES))
        raise ValueError(f"{op}: target has dtype {short(target.dtype)}; allowed: {allowed}")
    if target.shape != expected:
        raise ValueError(f"{op}: target has shape {tuple(target.shape)}; expected {tuple(expected)}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    return target if target.dtype == torch.int64 else target.to(torch.int64)


def check_weight(op: str, weight: Tensor | None, classes: int, input: Tensor) -> None:
    if weight is None:
        return
    check_float(op, "weight", weight)
    if tuple(weight.shape) != (classes,):
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected ({classes},), one for each class")
    if weight.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"{op}: weight has dtype {short(weight.dtype)}; allowed: that of input ({short(input.dtype)}) or float32"
        )
