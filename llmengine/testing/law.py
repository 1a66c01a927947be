"""The tolerance law: how wrong a result may be, measured by how wrong plain PyTorch is in the same precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2.0, 3.0


def assert_law(ours: Tensor, plain: Tensor, oracle: Tensor, factor: float, what: str) -> None:
    """Compares `ours` with the float64 `oracle`, both computed from the same rounded inputs.

    max|ours - oracle| <= factor max|plain - oracle| + floor  and  rms(...) <= (factor + 1) / 2 rms(...) + floor / 8,
    where `plain` is PyTorch's result in the dtype of `ours` and the floor two roundings of the largest element of the
    oracle (of a gradient four), plus two float32 roundings of 1: samples are of order one, and what cancels does so up
    to the roundings of its terms. Gradients have wider bounds: they also carry the one rounding of a saved statistic (a
    log-sum-exp) that is common to a whole row and does not average out.
    NaN and infinities must stand in the same places. Integers must be equal.
    """
    if ours.shape != oracle.shape:
        raise AssertionError(f"{what}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}")
    if not ours.is_floating_point() and not torch.equal(ours, oracle):
        raise AssertionError(f"{what}: differs at {(ours != oracle).nonzero()[0].tolist()}")
    if not ours.numel() or not ours.is_floating_point():
        return
    o, y, p = oracle.double(), ours.double(), plain.double()
    finite = o.isfinite()
    for name, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        if not torch.equal(test(y), test(o)):
            worst = (test(y) != test(o)).nonzero()[0].tolist()
            raise AssertionError(f"{what}: {name} differs at {worst}: ours {y[tuple(worst)]}, oracle {o[tuple(worst)]}")
    # where plain PyTorch itself has NaN or infinity it sets no bound: an allowance of NaN would allow everything
    o, y, p = (torch.where(finite, t, 0.0) for t in (o, y, torch.where(p.isfinite(), p, o)))
    floor = (factor - 1) * torch.finfo(ours.dtype).eps * o.abs().max().item() + torch.finfo(torch.float32).eps
    error, allowed = (y - o).abs(), factor * (p - o).abs().max().item() + floor
    if error.max().item() > allowed:
        where = tuple(torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what}: error {error.max().item():.3e} exceeds {allowed:.3e} at {[int(i) for i in where]}: "
            f"ours {y[where].item():.9g}, plain PyTorch {p[where].item():.9g}, float64 {o[where].item():.9g}"
        )
    rms, rms_allowed = _rms(y - o), (factor + 1) / 2 * _rms(p - o) + floor / min(8, ours.numel())
    if rms > rms_allowed:
        raise AssertionError(f"{what}: rms error {rms:.3e} exceeds {rms_allowed:.3e}")


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Within the block, PyTorch fills every uninitialised buffer with NaN: an element that a kernel forgets shows."""
    state = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def assert_near(ours: Tensor, other: Tensor, tolerance: float, what: str = "") -> None:
    """Equal shapes and dtypes, and no element off by more than `tolerance` times the largest one of `other`, or 1."""
    if (ours.shape, ours.dtype) != (other.shape, other.dtype):
        raise AssertionError(f"{what}: {tuple(ours.shape)} {ours.dtype}, expected {tuple(other.shape)} {other.dtype}")
    if not other.numel():
        return
    scale = max(1.0, other.abs().max().item())
    error = (ours - other).abs().max().item()
    if not error <= tolerance * scale:
        raise AssertionError(f"{what}: error {error:.2e} exceeds {tolerance:.0e} x {scale:.2g}")
