"""AdamW in the simulator: every pair of dtypes, more parameters than a launch takes, chunks, equal draws, equal bits.

One step of the operator obeys the laws of tests/test_ops.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmengine
from llmengine.optim import AdamW
from llmengine.testing.simulator import SCHEDULES

from .harness import Break, assert_caught

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Ways of keeping state: (weights' dtype, options); among them every pair of weights' and moments' dtypes.
KEPT = [
    (F32, {}),
    (F32, {"state_dtype": BF16, "stochastic_rounding": True}),
    (BF16, {}),
    (BF16, {"stochastic_rounding": True}),
    (BF16, {"stochastic_rounding": True, "state_dtype": F32}),
    (BF16, {"master_weights": True}),
    (BF16, {"master_weights": True, "state_dtype": BF16, "stochastic_rounding": True}),
    (F16, {}),
    (F16, {"master_weights": True}),
    (F16, {"state_dtype": BF16}),
]
SIZES = (13, 4096, 0, 1, 4099)  # of a chunk, beyond it, of no whole vector


def results(
    backend: str, dtype: torch.dtype, sizes=SIZES, steps: int = 2, offset: int = 0, found_inf: bool = False, **options
) -> list[Tensor]:
    """Every tensor after some steps: weights and all of their state. The parameters have unequal counters."""
    g = torch.Generator().manual_seed(0)

    def tensor(size: int) -> Tensor:
        return torch.randn(size + offset, generator=g).to(dtype)[offset:]

    weights = [nn.Parameter(tensor(size)) for size in sizes]
    for weight in weights:
        weight.data = tensor(len(weight))  # a view, where it begins between 16 bytes
    optimizer = AdamW(weights, 0.1, betas=(0.8, 0.95), seed=-5, **options)
    if found_inf:
        optimizer.found_inf = torch.ones(())
    with llmengine.backend(backend):
        for step in range(steps):
            for i, weight in enumerate(weights):
                weight.grad = tensor(len(weight)) if step or i % 3 else None
            optimizer.step(gradient_scale=0.5 if step else None)
    kept = [value for weight in weights for value in optimizer.state[weight].values()]
    return [weight.detach() for weight in weights] + kept


def assert_same(ours: list[Tensor], theirs: list[Tensor], what: str = "") -> None:
    """But for elements whose float is off by its last bits: they may be rounded to another 16-bit neighbour."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        near = 8 * torch.finfo(F32).eps
        apart = (a.double() - b.double()).abs() > near * (1 + b.double().abs())
        assert not a.isnan().any() and apart.double().sum() <= max(1, 0.003 * a.numel()), f"differs: {what} tensor {i}"


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("dtype, options", KEPT, ids=str)
def test_every_way_of_keeping_state_is_the_references(native, dtype: torch.dtype, options: dict, amsgrad: bool):
    native.set_schedule("random", 3)
    options = options | {"amsgrad": amsgrad, "maximize": amsgrad}
    assert_same(results("cuda_sim", dtype, **options), results("reference", dtype, **options))


def test_every_schedule_gives_equal_bits(native):
    found = []
    for order in SCHEDULES:
        native.set_schedule(order, 7)
        found.append(results("cuda_sim", BF16, (4100, 50), stochastic_rounding=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_more_parameters_than_a_launch_takes(native):
    sizes = (3, 0, 9, 1, 17) * 50
    options = {"stochastic_rounding": True}  # whose draws tell one parameter from the other
    assert_same(results("cuda_sim", BF16, sizes, **options), results("reference", BF16, sizes, **options))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parameters_that_begin_anywhere(native, dtype: torch.dtype):
    ours = results("cuda_sim", dtype, (30, 4097), offset=1)
    assert_same(ours, results("reference", dtype, (30, 4097), offset=1))


def assert_nothing_changes_where_a_step_overflowed() -> None:
    before = results("reference", BF16, steps=0)
    after = results("cuda_sim", BF16, found_inf=True)
    assert all(torch.equal(a, b) for a, b in zip(after[: len(before)], before, strict=True))
    assert not any(value.any() for value in after[len(before) :])


def test_a_step_that_overflowed_changes_nothing(native):
    assert_nothing_changes_where_a_step_overflowed()


@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_the_learning_rate_may_be_the_hosts_or_the_devices(native, dtype: torch.dtype):
    """On a GPU it is read where it lies; the simulator's device and the host are one, so here the kernel is called."""
    found = []
    for given in ({"lr": torch.tensor(0.125, dtype=dtype), "rate": 0.0}, {"lr": None, "rate": 0.125}):
        weight, step, m, v = torch.linspace(-1, 1, 40), torch.tensor(2.0), torch.ones(40), torch.ones(40)
        native.adamw(
            parameters=[weight], gradients=[torch.ones(40)], exp_avgs=[m], exp_avg_sqs=[v], max_exp_avg_sqs=[],
            masters=[], steps=[step], numbers=[0], multiplier=None, found_inf=None, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.1, maximize=False, stochastic=False, seed=0, stream=0,
            factors=torch.empty(1, 4, dtype=torch.int64), **given,
        )  # fmt: skip
        found.append(weight)
    assert torch.equal(*found) and found[0].isfinite().all()


def test_float16_moments_of_other_parameters_are_an_error(native):
    weight, half = torch.ones(4), torch.ones(4, dtype=F16)
    with pytest.raises(ValueError, match="exp_avgs may be float16 only where parameters are; these are float32"):
        native.adamw(
            parameters=[weight], gradients=[weight], exp_avgs=[half], exp_avg_sqs=[half], max_exp_avg_sqs=[],
            masters=[], steps=[torch.zeros(())], numbers=[0], lr=None, rate=0.1, multiplier=None, found_inf=None,
            beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=False, stochastic=False, seed=0, stream=0,
            factors=torch.empty(1, 4, dtype=torch.int64),
        )  # fmt: skip


# ---- one line broken -------------------------------------------------------------------------------------------------


def attempt() -> None:
    for dtype, options in (KEPT[1], KEPT[3], KEPT[5]):
        assert_same(results("cuda_sim", dtype, **options), results("reference", dtype, **options), str(options))
    sizes = (5,) * 70  # two launches
    options = {"stochastic_rounding": True}
    assert_same(results("cuda_sim", BF16, sizes, **options), results("reference", BF16, sizes, **options))
    assert_same(results("cuda_sim", BF16, (9,), offset=1), results("reference", BF16, (9,), offset=1))
    assert_nothing_changes_where_a_step_overflowed()


ADAMW = ("adamw", "adamw.cu")
BREAKS: dict[str, Break] = {
    "the block before": ("adamw", "tensor_list.cuh", "first[middle] <= block", "first[middle] < block", "differs"),
    "a step behind": (*ADAMW, "const double t = counted;", "const double t = counted - 1.0f;", "differs"),
    "chunks that overlap": (*ADAMW, "first[which]) * kChunk;", "first[which]) * (kChunk - 4);", "races"),
    "the end of a chunk": (
        *ADAMW, "end - at < n ? static_cast<int>(end - at) : n", "n", "past the end|across its end",
    ),
    "unaligned taken for aligned": (*ADAMW, "aligned = t.aligned()", "aligned = true", "not a multiple of"),
    "the other half of the draw": (*ADAMW, "w, p.stochastic, draws[0], 0", "w, p.stochastic, draws[0], 16", "differs"),
    "one draw for all groups": (*ADAMW, "static_cast<uint32_t>(place / 4)", "static_cast<uint32_t>(q)", "differs"),
    "factors of another launch": (*ADAMW, "place[place] = static_cast<int>(i)", "place[place] = place", "differs"),
    "the moments of a step that overflowed": (
        *ADAMW, "  if (p.found_inf && *p.found_inf != 0.0f) return;\n", "", "assert",
    ),
    "the gradient in the place of its mean": (*ADAMW, "e.exp_avg, q, m, p", "e.exp_avg, q, g, p", "differs"),
}  # fmt: skip


def test_whole_kernels_pass_what_broken_ones_must_fail(native):
    native.set_schedule("random", 1)
    attempt()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_caught(native, name: str, tmp_path: Path, monkeypatch):
    assert_caught(BREAKS[name], attempt, tmp_path, monkeypatch)
