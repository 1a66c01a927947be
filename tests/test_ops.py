"""The laws that every operator obeys, on every backend of this machine, over the cases of llmengine.testing.samples."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import llmengine
from llmengine.backends import cuda_sim
from llmengine.ops import registry
from llmengine.testing import LAYOUTS, Operator, Sample, Target, all_operators, assert_law, evaluate, poison, targets
from llmengine.testing.law import OUTPUT

OPERATORS = all_operators()
CASES = [pytest.param(op, s, id=f"{op.name}-{s.name}") for op in OPERATORS for s in op.samples()]
FIRST = [pytest.param(op, op.samples()[0], id=op.name) for op in OPERATORS]
DIFFERENTIABLE = [c for c in FIRST if c.values[1].differentiable()]
# The same for every backend that has the operator.
ON = [(t, op) for t in targets() for op in OPERATORS if t.has(op)]
ALL_ON = [
    pytest.param(
        t,
        op,
        s,
        d,
        id=f"{t.backend}-{op.name}-{s.name}-{d}",
        marks=[] if t.always_tries(op, i, d) else [pytest.mark.heavy],
    )
    for t, op in ON
    for i, s in enumerate(op.samples())
    for d in t.dtypes
]
FIRST_ON = [pytest.param(t, op, op.samples()[0], id=f"{t.backend}-{op.name}") for t, op in ON]


@pytest.fixture(autouse=True)
def target_is_ready(request):
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    if target is not None and target.prepare:
        target.prepare(request.node.name)


def allclose(ours, other) -> None:
    outputs, gradients = ours
    for a, b in zip([*outputs, *gradients.values()], [*other[0], *other[1].values()], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("target, op, sample, dtype", ALL_ON)
def test_errors_against_float64_are_those_of_plain_pytorch(
    target: Target, op: Operator, sample: Sample, dtype: torch.dtype
):
    given = sample.on(target.device).rounded(dtype)
    oracle = evaluate(op.function, given.rounded(torch.float64), "reference")
    plain = evaluate(op.plain or op.function, given, None if op.plain else "reference")
    with poison():
        ours = evaluate(op.function, given, target.backend)
    for i, (y, p, o) in enumerate(zip(ours[0], plain[0], oracle[0], strict=True)):
        assert_law(y, p, o, OUTPUT, f"{op.name} {sample.name} {dtype}: output {i}")
    assert ours[1].keys() == oracle[1].keys()
    for key in ours[1]:
        what = f"{op.name} {sample.name} {dtype}: grad {key}"
        assert_law(ours[1][key], plain[1][key], oracle[1][key], target.gradient_factor, what)
        assert ours[1][key].dtype == given.tensors()[key].dtype


@pytest.mark.parametrize("op, sample", [c for c in CASES if c.values[0].plain])
def test_reference_is_plain_pytorch_in_float64(op: Operator, sample: Sample):
    reference = evaluate(op.function, sample, "reference")
    plain = evaluate(op.plain, sample, None)
    for a, b in zip([*reference[0], *reference[1].values()], [*plain[0], *plain[1].values()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("op, sample", [c for c in DIFFERENTIABLE if not c.values[0].rounds])
def test_gradcheck_of_the_reference(op: Operator, sample: Sample):
    keys = sample.differentiable()

    def function(*leaves):
        given = dict(zip(keys, leaves, strict=True))
        torch.manual_seed(5)
        with llmengine.backend("reference"):
            return op.function(
                *(given.get(i, a) for i, a in enumerate(sample.args)),
                **{k: given.get(k, v) for k, v in sample.kwargs.items()},
            )

    leaves = [sample.tensors()[k].clone().requires_grad_() for k in keys]
    with llmengine.backend("reference"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("target, op, sample", FIRST_ON)
def test_every_layout_of_every_argument_gives_the_same_answer(
    target: Target, op: Operator, sample: Sample, layout: str
):
    moved = sample.on(target.device)
    given = moved.rounded(torch.float32)
    expected = evaluate(op.function, given, target.backend)
    for key in given.tensors():
        allclose(evaluate(op.function, moved.rounded(torch.float32, LAYOUTS[layout], key), target.backend), expected)


@pytest.mark.parametrize("target, op, sample", FIRST_ON)
def test_backward_accepts_expanded_gradients(target: Target, op: Operator, sample: Sample):
    """Autograd hands out stride-0 gradients (y.sum().backward()); kernels that assume strides return silent garbage."""
    given = sample.on(target.device).rounded(torch.float32)
    expanded = evaluate(op.function, given, target.backend, lambda o: o.new_ones(()).expand(o.shape))
    allclose(expanded, evaluate(op.function, given, target.backend, torch.ones_like))


@pytest.mark.parametrize("target", targets(), ids=lambda t: t.backend)
def test_no_tokens_have_gradients_of_any_strides(target: Target):
    """Of no elements strides say nothing, and `.contiguous()` changes none."""
    x = torch.randn(0, 8, device=target.device, requires_grad=True)
    up, down = torch.randn(16, 8, device=target.device), torch.randn(8, 16, device=target.device)
    with llmengine.backend(target.backend):
        for y in (
            llmengine.functional.ffn(x, up, down),
            llmengine.functional.layer_norm(x, (8,)),
            llmengine.functional.rms_norm(x, (8,)),
        ):
            assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 8)


@pytest.mark.parametrize("target, op, sample", FIRST_ON)
def test_gradients_appear_only_where_asked(target: Target, op: Operator, sample: Sample):
    given = sample.on(target.device).rounded(torch.float32)
    everything = evaluate(op.function, given, target.backend)[1]
    for wanted in everything:
        others = tuple(k for k in everything if k != wanted) + given.constants
        alone = Sample(given.name, given.args, given.kwargs, others, given.float32_stays)
        torch.testing.assert_close(evaluate(op.function, alone, target.backend)[1][wanted], everything[wanted])


@pytest.mark.parametrize("op, sample", DIFFERENTIABLE)
def test_checkpoints_give_the_same_answer(op: Operator, sample: Sample):
    """They run the forward again, and hand out each tensor that it saved once."""
    given = sample.rounded(torch.float32)

    def checkpointed(*args, **kwargs):
        return checkpoint(op.function, *args, use_reentrant=False, **kwargs)

    allclose(evaluate(checkpointed, given, None), evaluate(op.function, given, None))


@pytest.mark.parametrize("target, op, sample", FIRST_ON)
def test_repeats_thread_counts_and_schedules_give_equal_bits(target: Target, op: Operator, sample: Sample):
    given = sample.on(target.device).rounded(torch.float32)
    first = evaluate(op.function, given, target.backend)
    threads = torch.get_num_threads()
    try:
        for n, order in zip((1, 2, 2), ("forward", "reversed", "random"), strict=True):
            torch.set_num_threads(n)
            if target.backend == "cuda_sim":
                cuda_sim.NATIVE.module.set_schedule(order, 7)
            again = evaluate(op.function, given, target.backend)
            assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True)), f"{n} threads"
            if n == threads:
                assert all(torch.equal(first[1][k], again[1][k]) for k in first[1]), f"{n} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op, sample", FIRST)
def test_opcheck(op: Operator, sample: Sample):
    """Schema, fake kernel and AOT dispatch of every node that the operator runs."""
    calls: list[tuple[str, tuple]] = []
    dispatch = registry.dispatch

    def record(name, args):
        calls.append((name, args))
        return dispatch(name, args)

    registry.dispatch = record
    try:
        evaluate(op.function, sample.rounded(torch.float32), None)
    finally:
        registry.dispatch = dispatch
    assert calls
    for name, args in calls:
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.llmengine, name).default, detached)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("op, sample", FIRST)
def test_compiles_into_one_graph(op: Operator, sample: Sample, dynamic: bool | None):
    given = sample.rounded(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    allclose(evaluate(compiled, given, None), evaluate(op.function, given, None))


@pytest.mark.parametrize("op, sample", [c for c in FIRST if c.values[0].plain])
def test_autocast_gives_the_dtypes_that_pytorch_gives(op: Operator, sample: Sample):
    given = sample.rounded(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = evaluate(op.function, given, None), evaluate(op.plain, given, None)
    exact = evaluate(op.function, given, None)
    assert [o.dtype for o in ours[0]] == [p.dtype for p in plain[0]]
    for key, gradient in ours[1].items():
        assert gradient.dtype == torch.float32, key
        # what a bf16 product may lose: the operands' rounding, in relation to the largest element
        assert (gradient - exact[1][key]).abs().max() <= 0.05 * exact[1][key].abs().max() + 1e-6, key


@pytest.mark.parametrize("op, sample", FIRST)
def test_meta_tensors_have_the_shapes_of_the_result(op: Operator, sample: Sample):
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = sample.rounded(torch.float32)
    torch.manual_seed(1234)
    real = op.function(*given.args, **given.kwargs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {k: mode.from_tensor(t) for k, t in given.tensors().items()}
        fake = op.function(
            *(fakes.get(i, a) for i, a in enumerate(given.args)),
            **{k: fakes.get(k, v) for k, v in given.kwargs.items()},
        )
    real, fake = ([r] if isinstance(r, torch.Tensor) else r for r in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op, sample", FIRST)
def test_other_float_dtypes_run_on_the_reference(op: Operator, sample: Sample, dtype: torch.dtype):
    given = sample.rounded(dtype)
    with pytest.raises(RuntimeError, match="demanded but refuses"):
        evaluate(op.function, given, "cpu")
    with pytest.warns(UserWarning, match="reference"):
        registry._warned.clear()
        evaluate(op.function, given, None)


def test_every_public_operator_has_samples():
    public = {name: getattr(llmengine.functional, name) for name in llmengine.functional.__all__}
    functions = {name for name, what in public.items() if not isinstance(what, type)}
    assert {op.name for op in OPERATORS if not op.of_optim} == functions
    assert {op.function.__name__ for op in OPERATORS if op.of_optim} == {"adamw", "gradient_norm"}
