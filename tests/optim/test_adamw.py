"""AdamW beside torch.optim's: many steps, state in both directions, groups, layouts, roundings.

One step of the operator obeys the laws of tests/test_ops.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import llmengine
from llmengine.optim import AdamW
from llmengine.testing import assert_law
from llmengine.testing.law import OUTPUT

SHAPES = ((5, 7), (4097,), (), (0, 3), (70, 3))
OPTIONS = [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.0}, {"betas": (0.0, 0.5), "eps": 1e-3}]


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(steps: int, shapes=SHAPES) -> Iterator[list[Tensor]]:
    g = torch.Generator().manual_seed(7)
    for _ in range(steps):
        yield [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def run(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[Tensor]:
    """Steps of the same gradients for all optimizers of parameters of SHAPES; the parameters."""
    given = [p for group in optimizer.param_groups for p in group["params"]]
    for number, step in enumerate(gradients(first + steps)):
        if number >= first:
            for parameter, gradient in zip(given, step, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    return [p.detach() for p in given]


# ---- beside PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_are_as_near_to_float64_as_pytorchs(dtype: torch.dtype, options: dict):
    exact = [p.detach().double().requires_grad_() for p in parameters(dtype)]
    oracle = torch.optim.AdamW(exact, 1e-2, **options)
    for step in gradients(50):
        for parameter, gradient in zip(exact, step, strict=True):
            parameter.grad = gradient.to(dtype).double()
        oracle.step()
    ours = run(AdamW(parameters(dtype), 1e-2, **options), 50)
    plain = run(torch.optim.AdamW(parameters(dtype), 1e-2, fused=True, **options), 50)
    for y, p, o in zip(ours, plain, exact, strict=True):
        assert_law(y, p, o.detach(), OUTPUT, f"{tuple(o.shape)}")


def test_a_double_model_runs_on_the_reference():
    ours = run(AdamW(parameters(torch.float64), 1e-2), 5)
    for y, o in zip(ours, run(torch.optim.AdamW(parameters(torch.float64), 1e-2), 5), strict=True):
        torch.testing.assert_close(y, o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_gradients_that_are_not_finite_do_what_they_do_in_pytorch(poison: float, amsgrad: bool):
    outcomes = []
    for make in (AdamW, torch.optim.AdamW):
        weight = nn.Parameter(torch.arange(40.0))
        optimizer = make([weight], 1e-2, amsgrad=amsgrad)
        for scale in (1.0, poison, 1.0, 1.0):
            weight.grad = torch.ones(40)
            weight.grad[:3] *= scale
            optimizer.step()
        outcomes.append(weight.detach())
    torch.testing.assert_close(*outcomes, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theirs", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_states_load_in_both_directions(theirs: dict, dtype: torch.dtype):
    def pytorchs():
        return torch.optim.AdamW(parameters(dtype), 1e-2, amsgrad=True, **theirs)

    def ours():
        return AdamW(parameters(dtype), 1e-2, amsgrad=True)

    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for give, take in ((pytorchs, ours), (ours, pytorchs)):
        first, second = give(), take()
        run(first, 3)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        with torch.no_grad():
            for a, b in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
                a.copy_(b)
        for a, b in zip(run(second, 4, first=3), run(first, 4, first=3), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    state = ours()
    run(state, 1)
    assert state.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


KEPT: list[dict] = [
    {"master_weights": True},
    {"stochastic_rounding": True, "state_dtype": torch.float32},
    {"stochastic_rounding": True},
]


@pytest.mark.parametrize("options", KEPT, ids=str)
def test_a_restored_optimizer_goes_on_bit_for_bit(options: dict):
    first = AdamW(parameters(torch.bfloat16), 1e-2, seed=3, **options)
    run(first, 3)
    state = copy.deepcopy(first.state_dict())
    second = AdamW([nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]], 1.0, **options)
    second.load_state_dict(state)
    for key, saved in state["state"].items():
        for name, value in second.state_dict()["state"][key].items():
            assert value.dtype == saved[name].dtype and torch.equal(value, saved[name]), name
    for a, b in zip(run(second, 4, first=3), run(first, 4, first=3), strict=True):
        assert torch.equal(a, b)


def test_masters_are_made_of_a_state_that_has_none_and_dropped_where_none_are_asked_for():
    plain = torch.optim.AdamW(parameters(torch.bfloat16), 1e-2, fused=True)
    run(plain, 2)
    ours = AdamW(parameters(torch.bfloat16), 1e-2, master_weights=True)
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    run(ours, 1, first=2)
    state = ours.state[ours.param_groups[0]["params"][0]]
    assert state["exp_avg"].dtype == state["master"].dtype == torch.float32 and state["step"] == 3
    without = AdamW(parameters(torch.bfloat16), 1e-2)
    without.load_state_dict(ours.state_dict())
    assert "master" not in without.state[without.param_groups[0]["params"][0]]


# ---- as an optimizer -------------------------------------------------------------------------------------------------


def test_groups_have_their_own_values_and_dtypes():
    def groups():
        a, b, c, d, e = parameters()
        half = nn.Parameter(a.detach().bfloat16())
        first = {"params": [a, b, half], "weight_decay": 0.5}
        return [first, {"params": [c, d], "lr": 0.1, "betas": (0.5, 0.9), "amsgrad": True}], e

    results = []
    for make in (AdamW, torch.optim.AdamW):
        given, late = groups()
        optimizer = make(given, 1e-2, fused=True)
        optimizer.add_param_group({"params": [late], "eps": 1e-2})
        for _ in range(5):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        results.append([p.detach() for g in optimizer.param_groups for p in g["params"]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parameters_without_gradients_are_left_alone():
    a, b = parameters(shapes=((3,), (4,)))
    optimizer = AdamW([a, b], 1e-2)
    before, a.grad = b.detach().clone(), torch.ones(3)
    optimizer.step()
    assert torch.equal(b, before) and b not in optimizer.state and a in optimizer.state
    AdamW([nn.Parameter(torch.ones(2))]).step()


@pytest.mark.parametrize("stochastic", [False, True])
def test_strided_parameters_and_gradients(stochastic: bool):
    """As contiguous ones, draws included."""

    def step(view) -> Tensor:
        weight = view(torch.arange(4096.0).bfloat16()).requires_grad_()
        weight.grad = torch.full((), 1.0, dtype=weight.dtype).expand(weight.shape)
        optimizer = AdamW([weight], 0.3, stochastic_rounding=stochastic)
        for _ in range(3):
            optimizer.step()
        return weight.detach()

    def transposed(x: Tensor) -> Tensor:
        return x.view(64, 64).t().contiguous().t()

    def spread(x: Tensor) -> Tensor:
        wide = torch.zeros(64, 64, 2, dtype=x.dtype)
        wide[..., 1] = x.view(64, 64)
        return wide[..., 1]

    expected = step(lambda x: x.view(64, 64))
    assert torch.equal(step(transposed), expected) and torch.equal(step(spread), expected)


def test_gradients_may_be_scaled():
    results = []
    for scale in (None, 0.25, torch.tensor(0.25)):
        weight = nn.Parameter(torch.linspace(-1, 1, 100))
        optimizer = AdamW([weight], 1e-2, eps=1.0)
        weight.grad = torch.linspace(1, 2, 100) / (1.0 if scale is None else scale)
        optimizer.step(gradient_scale=scale)
        results.append(weight.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_grad_scaler_skips_a_step_that_overflowed():
    results = []
    for make in (AdamW, torch.optim.AdamW):
        weight = nn.Parameter(torch.linspace(-1, 1, 100))
        optimizer, scaler = make([weight], 1e-2, fused=True), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((weight.square() * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[weight]["step"] == 2 and scaler.get_scale() == 512
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def test_a_learning_rate_may_be_a_tensor_and_be_scheduled():
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        optimizer = AdamW(parameters(), lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
        for _ in range(2):
            run(optimizer, 1)
            schedule.step()
        results.append([p.detach() for p in optimizer.param_groups[0]["params"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_closure_is_called_with_gradients_on():
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight], 1e-2)

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and weight[0] < 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_as_the_original(again):
    optimizer = AdamW(parameters(torch.bfloat16), 1e-2, master_weights=True)
    run(optimizer, 2)
    other = again(optimizer)
    for a, b in zip(run(other, 2, first=2), run(optimizer, 2, first=2), strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_a_backward_pass_still_needs_counts_as_changed():
    weight = nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    AdamW([weight], 1e-2).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_step_is_the_same():
    torch._dynamo.reset()
    plain, compiled = AdamW(parameters(), 1e-2), AdamW(parameters(), 1e-2)
    compiled.step = torch.compile(compiled.step, backend="aot_eager")  # type: ignore[method-assign]
    for a, b in zip(run(compiled, 3), run(plain, 3), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"differentiable": True}, "differentiable=True is not supported"),
        ({"state_dtype": torch.float16}, "state_dtype is torch.float16; allowed: None, torch.float32, torch.bfloat16"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
    ],
)
def test_bad_options_are_named(options: dict, problem: str):
    with pytest.raises(ValueError, match=problem):
        AdamW(parameters(), **options)


def test_bad_parameters_and_gradients_are_named():
    with pytest.raises(ValueError, match="params has a tensor of torch"):
        AdamW([torch.ones(2, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="stochastic_rounding takes bfloat16 and float32 parameters, got float16"):
        AdamW(parameters(torch.float16), stochastic_rounding=True)
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW does not support sparse gradients"):
        AdamW(embedding.parameters()).step()


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


def tiny_steps(**options) -> Tensor:
    """65536 weights of 1 after eight steps that take 1/10 of a unit in the last place (below 1: 2^-8) each."""
    weight = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = AdamW([weight], 2**-8 / 10, weight_decay=0.0, **options)
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def test_stochastic_rounding_keeps_the_expectation_of_updates_that_rounding_to_nearest_loses():
    assert torch.equal(tiny_steps(), torch.ones(1 << 16, dtype=torch.bfloat16))
    moved = (1 - tiny_steps(stochastic_rounding=True, state_dtype=torch.float32).double()) * 2**8  # in units
    # the sum of eight draws of 1 with probability 1/10: mean 0.8, variance 0.72
    assert abs(moved.mean() - 0.8) < 5 * (0.72 / 65536) ** 0.5
    assert abs(moved.var() - 0.72) < 0.03
    # neighbours do not move together
    assert abs(torch.corrcoef(torch.stack([moved[:-1], moved[1:]]))[0, 1]) < 0.02


def test_moments_in_bfloat16_have_the_expectation_of_those_in_float32():
    """Of a second moment that falls by 1/1000 a step, too little for bfloat16, and a first that falls by 1/10."""
    weight = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = AdamW([weight], 1e-3, stochastic_rounding=True)
    for step in range(30):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    for name, first, beta in (("exp_avg", 0.1, 0.9), ("exp_avg_sq", 0.001, 0.999)):
        ratio = state[name].double().mean() / (first * beta**29)
        assert abs(ratio - 1) < 1e-3, name


def test_stochastic_rounding_is_a_function_of_seed_step_and_place():
    options = {"stochastic_rounding": True}
    first = tiny_steps(**options)
    assert torch.equal(tiny_steps(**options), first)
    assert not torch.equal(tiny_steps(seed=1, **options), first)
    weights = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    AdamW(weights, 2**-10, **options).step()
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", KEPT, ids=str)
def test_backends_draw_the_same(options: dict, amsgrad: bool):
    results = []
    for backend in ("cpu", "reference"):
        with llmengine.backend(backend):
            optimizer = AdamW(parameters(torch.bfloat16), 1e-2, seed=-5, amsgrad=amsgrad, **options)
            weights = run(optimizer, 3)
            moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
            results.append(torch.cat([t.flatten().float() for t in weights + moments]))
    # equal draws, but for elements that a float's last bit pushes over a boundary
    difference = results[0] - results[1]
    assert (difference.abs() > 1e-6 * results[0].abs()).double().mean() < 2e-3


@pytest.mark.parametrize("options", [*KEPT, {}], ids=str)
def test_threads_do_not_change_a_bit(options: dict):
    shapes = ((300_001,), (5,), (1 << 16,), (70_000,))
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            given = parameters(torch.bfloat16, shapes)
            optimizer = AdamW(given, 1e-2, **options)
            for step in gradients(2, shapes):
                for parameter, gradient in zip(given, step, strict=True):
                    parameter.grad = gradient.to(parameter.dtype)
                optimizer.step()
            results.append([p.detach() for p in given])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def losses(dtype: torch.dtype, **options) -> list[float]:
    """Of a small network that learns a random function, its weights in `dtype`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    inputs = torch.randn(256, 16)
    targets = torch.sin(inputs @ torch.randn(16, 1))
    model.to(dtype)
    optimizer = AdamW(model.parameters(), 1e-3, weight_decay=0.0, **options)
    found = []
    for _ in range(300):
        loss = (model(inputs.to(dtype)).float() - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_bfloat16_training_with_masters_or_stochastic_rounding_follows_float32():
    exact, nearest = losses(torch.float32), losses(torch.bfloat16)
    assert exact[-1] < 0.6 * exact[0]
    for options in KEPT:
        assert abs(losses(torch.bfloat16, **options)[-1] - exact[-1]) < 0.1 * exact[-1], options
    assert nearest[-1] - exact[-1] > 0.1 * exact[-1]  # what they are for
