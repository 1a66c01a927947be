"""The choice among backends: demands, refusals, explanations, warnings, and what the engine costs to import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import llmengine
from llmengine import functional
from llmengine.backends.cpu import native
from llmengine.ops import registry
from llmengine.testing import targets

ROOT = Path(__file__).resolve().parent.parent
X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """Every test begins without demands, with all warnings still to come, and hears of its device's backends."""
    monkeypatch.delenv("LLMENGINE_BACKEND", raising=False)
    monkeypatch.setattr(registry, "EXPLAINED", ())
    monkeypatch.setattr(registry, "_warned", set())


def ran(function, *args) -> list[str]:
    """The backends that a call used: the first line of each paragraph of its explanation."""
    lines = llmengine.explain(function, *args).splitlines()
    return [line.split(": ")[1] for line in lines if not line.startswith(" ")]


# ---- demands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_demand_is_met(name: str):
    with llmengine.backend(name):
        assert ran("softmax", X, -1) == [name]


def test_demands_nest_and_end():
    assert ran("softmax", X, -1) == ["cpu"]
    with llmengine.backend("reference"):
        with llmengine.backend("cpu"):
            assert ran("softmax", X, -1) == ["cpu"]
        assert ran("softmax", X, -1) == ["reference"]
    with pytest.raises(KeyError), llmengine.backend("reference"):
        raise KeyError
    assert ran("softmax", X, -1) == ["cpu"]


def test_a_demand_never_falls_back():
    with llmengine.backend("cpu"), pytest.raises(RuntimeError) as error:
        functional.softmax(X.half(), -1)
    assert str(error.value) == (
        "softmax_forward: backend 'cpu' was demanded but refuses: "
        "the cpu backend takes float32 and bfloat16, got float16"
    )
    for name in ("cuda", "triton"):
        with llmengine.backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' was demanded but refuses"):
            functional.softmax(X.double(), -1)


def test_a_demand_holds_in_its_own_thread_only():
    seen: list[list[str]] = []
    with llmengine.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ran("softmax", X, -1)))
        thread.start()
        thread.join()
        assert ran("softmax", X, -1) == ["reference"]
    assert seen == [["cpu"]]


def test_the_environment_demands_and_a_block_overrules_it(monkeypatch):
    monkeypatch.setenv("LLMENGINE_BACKEND", "reference")
    assert ran("softmax", X, -1) == ["reference"]
    with llmengine.backend("cpu"):
        assert ran("softmax", X, -1) == ["cpu"]
    monkeypatch.setenv("LLMENGINE_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' was demanded but refuses"):
        functional.softmax(X.double(), -1)
    monkeypatch.setenv("LLMENGINE_BACKEND", "")
    assert ran("softmax", X, -1) == ["cpu"]


def test_unknown_backends_are_named_with_the_known(monkeypatch):
    message = "backend: 'gpu' is not one of cuda, triton, cpu, cuda_sim, reference"
    with pytest.raises(ValueError, match=message), llmengine.backend("gpu"):
        pass
    monkeypatch.setenv("LLMENGINE_BACKEND", "gpu")
    with pytest.raises(ValueError, match=message):
        functional.softmax(X, -1)


def test_a_demand_covers_the_backward():
    x = X.clone().requires_grad_()
    assert ran(lambda: functional.softmax(x, -1).sum().backward()) == ["cpu", "cpu"]
    with llmengine.backend("reference"):
        assert ran(lambda: functional.softmax(x, -1).sum().backward()) == ["reference", "reference"]


# ---- past the dispatcher ---------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch) -> list[str]:
    """The operators that came by way of torch.library's node, and not straight."""
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        yield seen


def test_a_mode_sees_forward_and_backward(nodes):
    x = X.clone().requires_grad_()
    functional.layer_norm(x, (8,)).sum().backward()
    assert [n for n in nodes if "llmengine" in n] == [
        "llmengine.norm_forward.default",
        "llmengine.norm_backward.default",
    ]


def test_a_function_mode_sees_the_node():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        functional.softmax(X, -1)
    assert "llmengine.softmax_forward.default" in seen


def test_a_profiler_sees_the_node():
    with torch.profiler.profile() as profile:
        functional.softmax(X, -1)
    assert "llmengine::softmax_forward" in {event.name for event in profile.events()}


def test_a_trace_holds_the_node():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's: traces are deprecated, and hold no branches
        traced = torch.jit.trace(lambda x: functional.softmax(x, -1), (X,), check_trace=False)
    assert "llmengine::softmax_forward" in str(traced.graph)


class Wrapped(torch.Tensor):
    """A subclass that says which functions it was given to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_sees_the_node_and_stays_itself():
    Wrapped.seen.clear()
    y = functional.softmax(X.as_subclass(Wrapped), -1)
    assert isinstance(y, Wrapped) and "llmengine.softmax_forward.default" in Wrapped.seen


def test_zeros_without_memory_are_zeros():
    found = functional.softmax(torch._efficientzerotensor((3, 8)), -1)
    assert torch.equal(found, torch.full((3, 8), 0.125))


def test_wrappers_of_functionalization_are_taken_off():
    wrapped = torch._to_functional_tensor(X)
    found = functional.softmax(wrapped, -1)
    assert torch._is_functional_tensor(found)
    assert torch.equal(torch._from_functional_tensor(found), functional.softmax(X, -1))


def test_shapes_alone_have_results_of_shapes():
    ids, table = torch.zeros(3, dtype=torch.int64, device="meta"), torch.zeros(5, 8, device="meta")
    assert functional.embedding(ids, table).shape == (3, 8)
    assert functional.cross_entropy(table, torch.zeros(5, dtype=torch.int64, device="meta")).shape == ()


def test_views_that_say_negated_are_negated():
    for negated in (torch._neg_view(X), torch.complex(X, X).conj().imag):
        assert negated.is_neg()
        given, meant = negated.requires_grad_(), X.neg().requires_grad_()
        for x in (given, meant):
            functional.softmax(x, -1).square().sum().backward()
        assert torch.equal(functional.softmax(given, -1), functional.softmax(meant, -1))
        assert torch.equal(given.grad, meant.grad)


def test_functorch_is_told_as_ever_that_it_is_not_served():
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: functional.layer_norm(x, (8,)).sum())(X)


def test_a_tensor_that_outlives_its_transform_is_the_one_it_wrapped():
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(X)
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    assert torch.equal(functional.softmax(left[0], -1), functional.softmax(X, -1))


def test_otherwise_the_call_goes_straight(monkeypatch):
    monkeypatch.setattr(registry, "_is_compiling", lambda: False)
    assert registry._unobserved((X, torch.nn.Parameter(X), None, 1e-5, True, "mean", torch.float32))
    assert not registry._unobserved((X, [True]))
    monkeypatch.setattr(registry, "_is_compiling", lambda: True)
    assert not registry._unobserved((X,))


# ---- explanations and warnings ---------------------------------------------------------------------------------------


def test_explain_tells_who_ran_and_why_the_others_did_not():
    assert llmengine.explain("layer_norm", X, (8,)) == "norm_forward: cpu"
    assert llmengine.explain(functional.layer_norm, X, (8,)) == "norm_forward: cpu"
    with pytest.warns(UserWarning, match="reference"):
        text = llmengine.explain("layer_norm", X.double(), (8,))
    assert text == "norm_forward: reference\n  not cpu: the cpu backend takes float32 and bfloat16, got float64"


def test_explain_tells_of_triton_where_the_device_is_not_its_own(monkeypatch):
    monkeypatch.setattr(registry, "EXPLAINED", ("triton",))
    triton = registry.Backend("triton", unavailable="it takes GPU tensors")
    monkeypatch.setitem(registry._loaded, "triton", triton)
    assert llmengine.explain("softmax", X, -1) == "softmax_forward: cpu\n  not triton: it takes GPU tensors"
    monkeypatch.setattr(registry, "PREFERENCE", {})  # as of a device without kernels
    assert llmengine.explain("softmax", X, -1) == "softmax_forward: reference\n  not triton: it takes GPU tensors"
    with llmengine.backend("reference"):
        assert llmengine.explain("softmax", X, -1) == "softmax_forward: reference"
    triton.unavailable = None
    monkeypatch.setattr(triton, "refuses", lambda *args: None)  # interpreted
    assert llmengine.explain("softmax", X, -1) == "softmax_forward: reference"


def test_explain_of_a_model_has_every_kernel_once():
    model = torch.nn.Sequential(llmengine.nn.LayerNorm(8), llmengine.nn.LayerNorm(8))
    assert llmengine.explain(model, X) == "norm_forward: cpu"


def test_what_a_kernel_tells_stands_beside_its_backend(monkeypatch):
    kernels = registry.load("cpu").kernels

    def run(*args, whole=kernels["softmax_forward"].run):
        registry.tell("compiled at first use: f<96>")
        return whole(*args)

    monkeypatch.setitem(kernels, "softmax_forward", registry.Kernel(run))
    assert llmengine.explain("softmax", X, -1) == "softmax_forward: cpu (compiled at first use: f<96>)"
    assert functional.softmax(X, -1).allclose(X.softmax(-1)), "nobody listens"

    def run_twice(*args):
        registry.tell("in two passes")
        return run(*args)

    monkeypatch.setitem(kernels, "softmax_forward", registry.Kernel(run_twice))
    told = llmengine.explain("softmax", X, -1)
    assert told == "softmax_forward: cpu (in two passes; compiled at first use: f<96>)"


def test_explain_of_an_unknown_operator():
    with pytest.raises(ValueError, match="explain: 'layernorm' is not one of add_layer_norm, "):
        llmengine.explain("layernorm", X)


def test_explain_ends_where_its_call_fails():
    with pytest.raises(ValueError, match="normalized_shape"):
        llmengine.explain("layer_norm", X, (9,))
    assert registry._choice.log is None


def test_the_fallback_warns_once_per_operator():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            functional.softmax(X.half(), -1)
        functional.layer_norm(X.half(), (8,))
    assert [str(w.message) for w in caught] == [
        f"llmengine: {op} on cpu runs on the slow reference backend "
        "(cpu: the cpu backend takes float32 and bfloat16, got float16)"
        for op in ("softmax_forward", "norm_forward")
    ]


def test_no_warning_where_the_reference_was_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with llmengine.backend("reference"):
            functional.softmax(X.half(), -1)


def test_a_device_without_kernels_runs_on_the_reference():
    """No backend but the reference is asked there: PyTorch runs the operator wherever it runs at all."""
    name, kernel = registry.pick("softmax_forward", (X.to("meta"), torch.float32))
    assert name == "reference"
    assert kernel.run(X.to("meta"), torch.float32).shape == X.shape


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    cpu = registry.Backend("cpu", unavailable="the module is not built")
    monkeypatch.setitem(registry._loaded, "cpu", cpu)
    with pytest.warns(UserWarning, match="the module is not built"):
        functional.softmax(X, -1)
    with llmengine.backend("cpu"), pytest.raises(RuntimeError, match="the module is not built"):
        functional.softmax(X, -1)


def test_all_refusals_together_are_an_error(monkeypatch):
    monkeypatch.setattr(registry, "PREFERENCE", {"cpu": ("cpu",)})
    with pytest.raises(RuntimeError, match="softmax_forward: no backend accepts these arguments: cpu: the cpu backend"):
        functional.softmax(X.half(), -1)


def test_a_backend_that_stands_back_runs_before_the_reference_and_where_it_is_demanded(monkeypatch):
    """As cuda does for attention: the other of its device comes first, and `explain` says why."""

    def fake(name: str, refusal: str | None = None) -> registry.Backend:
        kernel = registry.Kernel(lambda *_: X, lambda *_: refusal)
        return registry.Backend(name, kernels={"attention_forward": kernel, "softmax_forward": kernel})

    for name in ("cuda", "triton"):
        monkeypatch.setitem(registry._loaded, name, fake(name))
    assert registry.pick("softmax_forward", (X,), "cuda")[0] == "cuda"
    assert registry.pick("attention_forward", (X,), "cuda")[0] == "triton"

    def first(op: str) -> tuple[str, str | None]:
        return registry._order(op, registry.PREFERENCE["cuda"])[0]

    for op in ("linear_cross_entropy", "linear_cross_entropy_shard"):
        for part in ("forward", "backward"):
            assert first(f"{op}_{part}") == ("cuda", registry.UNMEASURED.format(op))
    assert first("attention_forward") == ("cuda", registry.UNMEASURED.format("attention"))
    with llmengine.backend("cuda"):
        assert registry.pick("attention_forward", (X,), "cuda")[0] == "cuda"
    monkeypatch.setitem(registry._loaded, "triton", fake("triton", "too wide"))
    assert registry.pick("attention_forward", (X,), "cuda")[0] == "cuda"
    monkeypatch.setitem(registry._loaded, "cuda", fake("cuda", "too narrow"))
    with pytest.warns(UserWarning, match="cuda: too narrow; triton: too wide"):
        assert registry.pick("attention_forward", (X,), "cuda")[0] == "reference"


# ---- Triton's refusals -----------------------------------------------------------------------------------------------

HEAD_264 = (torch.zeros(1, 1, 2, 264),) * 3
REFUSED_BY_TRITON = [
    ("softmax", (X.double(), -1), "softmax_forward", "takes float32, bfloat16 and float16, got float64"),
    ("scaled_dot_product_attention", HEAD_264, "attention_forward", "takes head dims up to 256, got 264"),
]


@pytest.mark.parametrize("function, args, op, reason", REFUSED_BY_TRITON, ids=["dtype", "head dim"])
def test_explain_tells_what_triton_does_not_take_and_a_demand_is_an_error(function, args, op, reason, monkeypatch):
    (device,) = (target.device for target in targets() if target.backend == "triton")
    monkeypatch.setitem(registry.PREFERENCE, device, ("triton", "reference"))
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.warns(UserWarning, match="slow reference backend"):
        text = llmengine.explain(function, *args)
    assert text == f"{op}: reference\n  not triton: the triton backend {reason}"
    with llmengine.backend("triton"), pytest.raises(RuntimeError) as error:
        getattr(functional, function)(*args)
    assert str(error.value) == f"{op}: backend 'triton' was demanded but refuses: the triton backend {reason}"


TRITON_CANNOT_RUN = """
import sys, torch
{without}
import llmengine
from llmengine.ops import registry
{preference}
print(llmengine.explain("softmax", torch.ones(2, 3), -1))
try:
    with llmengine.backend("triton"):
        llmengine.functional.softmax(torch.ones(2, 3), -1)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("preference", ["", "registry.PREFERENCE['cpu'] = ('triton', 'cpu', 'reference')"])
@pytest.mark.parametrize(
    "without, reason",
    [
        ("sys.modules['triton'] = None", r"Triton cannot be imported \(.*\); run `pip install triton`"),
        ("torch.cuda.is_available = lambda: False", "PyTorch sees no GPU"),
    ],
    ids=["module", "GPU"],
)
def test_without_triton_or_a_gpu_explain_says_so_and_a_demand_is_an_error(without: str, reason: str, preference: str):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = TRITON_CANNOT_RUN.format(without=without, preference=preference)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": ""}
    )
    assert re.fullmatch(
        f"softmax_forward: cpu\n  not triton: {reason}\n"
        f"softmax_forward: backend 'triton' was demanded but refuses: {reason}\n",
        done.stdout,
    ), done.stdout + done.stderr


def test_report():
    report = registry.report()
    assert list(report["backends"]) == ["cuda", "triton", "cpu", "cuda_sim", "reference"]
    assert report["backends"]["reference"] == {"unavailable": None, "operators": report["operators"]}
    assert report["backends"]["cpu"]["unavailable"] is None
    assert (
        {"norm_forward", "softmax_backward"} <= set(report["backends"]["cpu"]["operators"]) <= set(report["operators"])
    )
    assert report["cpu_isa"] in report["cpu_isas_supported"]
    assert report["cpu_isa_notice"] == "" or "amx" not in report["cpu_isas_supported"]


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_import_costs_little_beyond_torch():
    """150 ms of processor time, the best of three: wall time would measure the machine's other work."""
    script = "import time, torch; t = time.process_time(); import llmengine; print(time.process_time() - t)"
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        times.append(float(done.stdout))
    assert min(times) < 0.15, f"{times} seconds"


def test_a_refusal_of_amx_is_told_once(monkeypatch):
    class Refused:
        @staticmethod
        def isa_notice() -> str:
            return "the processor has AMX but the system refuses its tiles (no): using avx512_bf16"

    monkeypatch.setattr(native, "module", Refused)
    monkeypatch.setattr(native, "_told", False)  # as in a process that has called no operator yet
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.delenv("LLMENGINE_CPU_ISA", raising=False)
    with pytest.warns(UserWarning, match=r"llmengine: .* refuses its tiles \(no\): using avx512_bf16"):
        registry.load("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.load("cpu")
        monkeypatch.setenv("LLMENGINE_CPU_ISA", "avx2")  # another was asked for: nothing to tell
        monkeypatch.setattr(native, "_told", False)
        registry._loaded.clear()
        registry.load("cpu")
