"""Direct calls of llmengine._cpu for tests/test_native.py: valid ones, ways to spoil their arguments, and guards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from llmengine import _cpu
from llmengine.testing import LAYOUTS, Operator, all_operators, evaluate

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    operator: str  # of llmengine.functional
    kernel: str  # of llmengine._cpu
    arguments: dict[str, Any]


def signature(name: str) -> list[str]:
    """The arguments of a kernel, or nothing for the module's other functions. pybind11 puts them into the docstring."""
    found = re.match(rf"{name}\(\*, (.*)\) -> None", getattr(_cpu, name).__doc__ or "")
    return re.findall(r"(\w+): ", found[1]) if found else []


def recorded_calls(operators: list[Operator]) -> list[Call]:
    """The calls that the operators' first samples make, in both dtypes; of operators that have no kernel here, none."""
    calls: list[Call] = []
    kernels = {name: getattr(_cpu, name) for name in dir(_cpu) if signature(name)}

    def recorder(operator: str, name: str):
        def call(**arguments):
            calls.append(Call(operator, name, {k: _copy(v) for k, v in arguments.items()}))
            kernels[name](**arguments)

        return call

    try:
        for operator in operators:
            for name in kernels:
                setattr(_cpu, name, recorder(operator.name, name))
            for sample in operator.samples()[:6]:
                for dtype in (torch.float32, torch.bfloat16):
                    _evaluate(operator, sample.rounded(dtype))
    finally:
        for name, kernel in kernels.items():
            setattr(_cpu, name, kernel)
    return calls


def _evaluate(operator: Operator, sample) -> None:
    try:
        evaluate(operator.function, sample, "cpu")
    except RuntimeError as error:
        if "has no kernel" not in str(error):
            raise


def _copy(value):
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


CALLS = recorded_calls(all_operators())
# The operators whose kernels this backend has: others have no law to obey here.
NATIVE = sorted({call.operator for call in CALLS})


def mutations(value) -> st.SearchStrategy:
    """Replacements for an argument: other values of its type, and for tensors other dtypes, shapes, strides, None."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([0, -1, 1, 7, 2**31, -(2**62)])
    if isinstance(value, float):
        return st.sampled_from([0.0, -1.0, 0.5, 1.0, 1e30, float("nan"), float("inf"), float("-inf")])
    if isinstance(value, str):
        return st.sampled_from(["", "none", "sum", "mean", "other"])
    if isinstance(value, list):
        return _list_mutations(value)
    if value is None:
        shapes = st.lists(st.integers(0, 5), max_size=4)
        return st.builds(lambda shape, dtype: torch.zeros(shape).to(dtype), shapes, st.sampled_from(DTYPES))
    return st.one_of(
        st.none(),
        st.sampled_from(DTYPES).map(value.to),
        st.sampled_from(sorted(LAYOUTS.keys() - {"huge stride"})).map(lambda layout: LAYOUTS[layout](value)),
        st.sampled_from([shape for shape in _other_shapes(value) if shape]).map(lambda make: make(value)),
        st.integers(-3, 100).map(lambda number: torch.full_like(value, number)),
        st.just(value[..., :1].expand(value.shape) if value.ndim else value),
        st.just(value[:1].expand(value.shape) if value.ndim else value),
    )


def _list_mutations(values: list) -> st.SearchStrategy:
    """One element spoilt, left out, or repeated."""
    if not values:
        return st.sampled_from([[torch.zeros(2)], [torch.zeros(2, dtype=torch.bfloat16)] * 2])
    place = st.integers(0, len(values) - 1)
    spoilt = place.flatmap(lambda i: mutations(values[i]).map(lambda v: [*values[:i], v, *values[i + 1 :]]))
    return st.one_of(
        spoilt, place.map(lambda i: values[:i] + values[i + 1 :]), place.map(lambda i: [*values, values[i]])
    )


def _other_shapes(value: Tensor) -> list:
    makers = [lambda t: t[None], lambda t: t.reshape((1,) * (9 - t.ndim) + t.shape), lambda t: t.new_zeros(0)]
    for dim in range(value.ndim):
        makers.append(lambda t, dim=dim: torch.cat([t, t.narrow(dim, 0, min(1, t.shape[dim]))], dim))
        makers.append(lambda t, dim=dim: t.narrow(dim, 0, max(0, t.shape[dim] - 1)))
        makers.append(lambda t, dim=dim: t.narrow(dim, 0, 0))
        makers.append(lambda t, dim=dim: t.sum(dim).to(t.dtype))
    return makers


def guarded(value):
    """The argument, with all its tensors in watched memory, and their guards."""
    if isinstance(value, Tensor):
        guard = Guarded(value)
        return guard.tensor, [guard]
    if isinstance(value, list):
        pairs = [guarded(v) for v in value]
        return [v for v, _ in pairs], [guard for _, guards in pairs for guard in guards]
    return value, []


class Guarded:
    """A tensor with the strides of another, alone in memory of its own whose every other byte is watched."""

    MARGIN = 512  # bytes before and after

    def __init__(self, like: Tensor):
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        size = like.element_size()
        self._bytes = torch.full((2 * self.MARGIN + extent * size,), 0xA5, dtype=torch.uint8)
        flat = self._bytes[self.MARGIN : self.MARGIN + extent * size].view(like.dtype)
        flat.copy_(like.as_strided((extent,), (1,)))
        self.tensor = flat.as_strided(like.shape, like.stride(), flat.storage_offset())
        inside = torch.zeros(extent, dtype=torch.bool)
        inside[torch.arange(extent).as_strided(like.shape, like.stride()).reshape(-1)] = True
        self._outside = torch.ones_like(self._bytes, dtype=torch.bool)
        self._outside[self.MARGIN : self.MARGIN + extent * size] = ~inside.repeat_interleave(size)
        self._before = self._bytes.clone()

    def intact(self) -> bool:
        return torch.equal(self._bytes[self._outside], self._before[self._outside])
