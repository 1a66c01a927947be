"""Every operator, forward and backward, captured in a CUDA graph and replayed with other inputs, against a plain call.

A kernel that reads an address or a number of the host's at replay, a launch on another stream, memory that is not the
graph's, a wait for the device: each fails here. Where there is no GPU the same test runs the C++ kernels, with a graph
that is nothing but the call again, so that the test itself is known to work.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.backends import cuda
from llmengine.testing import Operator, Sample, Target, all_operators, poison, targets
from llmengine.testing.samples import linear_cross_entropy
from llmengine.testing.targets import HALVES_ONLY


class Call:
    """One call with inputs, upstream gradients and results that stay where they are."""

    def __init__(self, op: Operator, sample: Sample, backend: str):
        self.function, self.backend = op.function, backend
        tensors = sample.tensors()
        self.leaves = {key: tensors[key].clone().requires_grad_() for key in sample.differentiable()}
        self.changing = [t.detach() for t in (tensors | self.leaves).values() if t.is_floating_point()]
        self.args = [self.leaves.get(i, a) for i, a in enumerate(sample.args)]
        self.kwargs = {k: self.leaves.get(k, v) for k, v in sample.kwargs.items()}
        self.upstream = [torch.randn_like(o) for o in self._differentiable(self._outputs())]
        self.changing += self.upstream

    def _outputs(self):
        with llmengine.backend(self.backend):
            outputs = self.function(*self.args, **self.kwargs)
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]

    @staticmethod
    def _differentiable(outputs):
        return [o for o in outputs if o.requires_grad]

    def __call__(self) -> list[torch.Tensor]:
        outputs = self._outputs()
        results = [o.detach() for o in outputs]
        if self.upstream:
            with llmengine.backend(self.backend):
                results += torch.autograd.grad(
                    self._differentiable(outputs), list(self.leaves.values()), self.upstream, materialize_grads=True
                )
        return results

    def change(self) -> None:
        """Other values of the same kind: each tensor's own, halved and in another order."""
        for t in self.changing:
            t.copy_(0.5 * t.flatten().flip(0).view(t.shape))


class Again:
    """Stands for a graph where there is none."""

    def __init__(self, call: Call):
        self.call, self.results = call, call()

    def replay(self) -> None:
        for kept, new in zip(self.results, self.call(), strict=True):
            kept.copy_(new)


class Graph:
    def __init__(self, call: Call):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and makes what is made once
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = call()

    def replay(self) -> None:
        self.graph.replay()


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(found, expected, strict=True)
    )


def samples_of(op: Operator) -> list[Sample]:
    """The first, and the first with dropout, whose seed is drawn within the graph."""
    samples = op.samples()
    return samples[:1] + [s for s in samples[1:] if s.kwargs.get("dropout_p", 0.0) > 0][:1]


def dtypes_of(t: Target, op: Operator) -> tuple[torch.dtype, ...]:
    """What CUDA takes in 16 bits alone, in those."""
    if t.has(op):
        return t.dtypes
    within = t.backend == "cuda" and op.node in HALVES_ONLY and op.nodes() <= set(cuda.KERNELS)
    return (torch.bfloat16, torch.float16) if within else ()


def tied(weight: torch.Tensor, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    words = functional.TiedEmbedding(weight, padding_idx=2)
    return words(ids), x @ words.weight.T


TIED_SAMPLE = Sample("padding", (torch.randn(9, 16), torch.tensor([[1, 2, 2], [7, 1, 1]]), torch.randn(3, 16)))
TIED = Operator("tied embedding", tied, lambda: [TIED_SAMPLE], node="embedding")  # no operator, but a model's way
KEPT = dataclasses.replace(linear_cross_entropy.OPERATORS[0], name="linear_cross_entropy_at_once")
KEPT.function = functools.partial(KEPT.function, recompute=False)  # with gradients from logits that are kept
TARGETS = [t for t in targets() if t.device == "cuda" or t.backend == "cpu"]
CASES = [
    pytest.param(t, op, s, dtype, id=f"{t.backend}-{op.name}-{s.name}-{dtype}")
    for t in TARGETS
    for op in (*all_operators(), TIED, KEPT)
    for s in samples_of(op)
    for dtype in dtypes_of(t, op)
]


@pytest.mark.parametrize("target, op, sample, dtype", CASES)
def test_a_replay_is_a_call(target: Target, op: Operator, sample: Sample, dtype: torch.dtype):
    call = Call(op, sample.on(target.device).rounded(dtype), target.backend)
    with poison():
        graph = (Graph if target.device == "cuda" else Again)(call)
        torch.manual_seed(0)
        graph.replay()
        before = [r.clone() for r in graph.results]
        call.change()
        torch.manual_seed(1)
        graph.replay()
        replayed = [r.clone() for r in graph.results]
        torch.manual_seed(1)
        expected = call()
    assert equal(replayed, expected)
    assert not equal(replayed, before), "the other inputs gave the same results"


def test_nothing_is_page_locked_while_a_graph_is_captured_but_what_exceeds_the_room():
    pytest.importorskip("triton")
    from llmengine.backends.triton.tensor_list import PageLocked

    locked = []
    memory = PageLocked(100, pin=lambda t: locked.append(t.numel()) or t.clone())
    memory.reserve()
    tables = [torch.arange(i, i + 24).view(4, 6) for i in range(5)]
    places = [memory.place(t) for t in tables[:4]]
    assert locked == [100]
    places.append(memory.place(tables[4]))
    assert locked == [100, 24]
    for place, table in zip(places, tables, strict=True):
        assert place.is_contiguous() and torch.equal(place, table)
    memory.reserve()
    assert locked == [100, 24, 100]
