"""The roofline: what a case counts, what a ceiling measures, what a row says."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llmengine
from llmengine import roofline
from llmengine.ops import registry
from llmengine.ops.registry import load
from llmengine.roofline import choices
from llmengine.roofline.cases import SHAPES
from llmengine.roofline.peers import flash_attention, flex, scaled_linear

CLOCK = roofline.Clock("cpu", 0.0)
CEILINGS = roofline.Ceilings(10.0, {torch.float32: 0.1, torch.bfloat16: 0.2})


def small(operator: str, dtype: torch.dtype = torch.float32) -> roofline.Case:
    return next(iter(roofline.cases("small", "cpu", dtype, [operator])))


def test_floor_is_the_slower_of_moving_and_multiplying():
    assert CEILINGS.floor_ms(torch.float32, 10e6, 0) == pytest.approx(1.0)  # 10 MB at 10 GB/s
    assert CEILINGS.floor_ms(torch.float32, 10e6, 1e9) == pytest.approx(10.0)  # a GFLOP at 0.1 TFLOP/s
    assert CEILINGS.floor_ms(torch.bfloat16, 10e6, 1e9) == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", list(roofline.OPERATORS))
def test_peers_compute_the_same(operator, dtype):
    for case in roofline.cases("small", "cpu", dtype, [operator]):
        ours = case.run["llmengine"](*case.tensors)
        theirs = case.run["torch"](*case.tensors)
        assert ours.shape == theirs.shape
        if "dropout" not in case.name:  # each has numbers of its own
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("operator", ["attention", "attention_sinks"])
def test_flex_attention_computes_the_same(operator):
    """Forward, not compiled: more of it does not run on a CPU."""
    for case in roofline.cases("small", "cpu", torch.float32, [operator]):
        sinks = operator.endswith("sinks")
        call = flex(case.tensors[0].shape[2], case.name.endswith("causal"), sinks, "cpu", compiled=False)
        torch.testing.assert_close(call(*case.tensors), case.run["llmengine"](*case.tensors), rtol=1e-5, atol=1e-5)


def test_pytorchs_8_bit_linear_computes_what_ours_does():
    g = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(shape, generator=g).bfloat16() for shape in ((20, 48), (32, 48), (32,)))
    ours = llmengine.functional.fp8_linear(x, weight, bias)
    torch.testing.assert_close(scaled_linear(x, weight, bias), ours, rtol=2**-7, atol=2**-4)


LIGER = {
    "layer_norm": ("liger_layer_norm", lambda x, w, b, eps: torch.nn.functional.layer_norm(x, w.shape, w, b, eps)),
    "rms_norm": (
        "liger_rms_norm", lambda x, w, eps, in_place: torch.nn.functional.rms_norm(x, w.shape, w, eps)
    ),
    "add_rms_norm": (
        "liger_fused_add_rms_norm",
        lambda x, r, w, eps, in_place: (torch.nn.functional.rms_norm(x + r, w.shape, w, eps), x + r),
    ),
    "gated_ffn": ("liger_swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up),
    "cross_entropy": ("liger_cross_entropy", torch.nn.functional.cross_entropy),
    "linear_cross_entropy": (
        "liger_fused_linear_cross_entropy",
        lambda x, w, target: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target),
    ),
}  # fmt: skip


@pytest.mark.parametrize("operator", list(LIGER))
def test_liger_is_a_peer_where_it_is(operator, monkeypatch):
    """By a stand-in of the functions' names and arguments: the kernels themselves need a GPU."""
    name, function = LIGER[operator]
    for module in ("cases", "layers"):
        monkeypatch.setattr(
            sys.modules[f"llmengine.roofline.{module}"], "liger", lambda x: SimpleNamespace(**{name: function})
        )
    for case in roofline.cases("small", "cpu", torch.float32, [operator]):
        torch.testing.assert_close(case.run["liger"](*case.tensors), case.run["torch"](*case.tensors))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_a_peer_where_it_is(causal: bool, monkeypatch):
    """By stand-ins of its two packages, with heads behind tokens: the second gave the log-sum-exp, too, once."""
    q, k, v = torch.randn(3, 2, 3, 7, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def function(q, k, v, causal):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    stand_ins = {"flash_attn": function, "flash_attn_interface": lambda *t, causal: (function(*t, causal), None)}
    for name, call in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=call, __spec__=object()))
    found = flash_attention(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), causal)
    assert list(found) == ["flash-attn 2", "flash-attn 3"] and not flash_attention(q, causal)
    for call in found.values():
        torch.testing.assert_close(call(q, k, v), expected)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_clock_of_a_gpu_is_its_drivers(refuses: bool, monkeypatch):
    """By a stand-in of the driver, which wants the GPU's name and the multiprocessors' clock."""
    called, asked = [], []

    def by_uuid(name, handle):
        asked.append(name)
        return 6 if refuses else 0

    def clock_info(handle, which, found):
        asked.append(which)
        found._obj.value = 1755
        return 0

    driver = SimpleNamespace(nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetClockInfo=clock_info)
    monkeypatch.setattr(sys.modules["llmengine.roofline.clock"], "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = roofline.Clock("cuda", 0.0)
    assert clock.megahertz(lambda: called.append(1)) == (None if refuses else 1755)
    assert asked == [b"GPU-1-2", 1][: 2 - refuses] and called
    assert CLOCK.megahertz(lambda: called.append(1)) is None


def test_an_optimizer_is_timed_by_its_step():
    rows = list(roofline.measure(small("adamw"), CLOCK, CEILINGS, compiled=True))
    assert [(row["pass"], row["peer"]) for row in rows] == [
        ("step", peer) for peer in ("llmengine", "torch", "torch foreach")
    ]
    assert all(row["gbytes_per_s"] * row["ms"] * 1e6 == pytest.approx(28 * 3 * 40) for row in rows)


@pytest.mark.parametrize("operator", ["ffn", "gated_ffn", "linear_cross_entropy"])
def test_operations_are_those_that_pytorch_counts(operator):
    case = small(operator)
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    with FlopCounterMode(display=False) as counter:
        output = case.run["torch"](*leaves)
    assert counter.get_total_flops() == case.flops
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == case.backward_flops


def test_attention_counts_its_products_and_in_the_backward_the_scores_once_more():
    full, causal = roofline.cases("small", "cpu", torch.float32, ["attention"])
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the others' operators are not counted
    with plain, FlopCounterMode(display=False) as counter:
        full.run["torch"](*full.tensors)
    assert counter.get_total_flops() == full.flops == 2 * causal.flops
    assert full.backward_flops == full.flops / 2 * 5  # scores, dP, dQ, dK, dV; the forward has two


@pytest.mark.parametrize("kind", ["cpu", "cuda", "small"])
def test_every_operator_has_shapes(kind):
    assert {shapes for shapes, _ in roofline.OPERATORS.values()} <= set(SHAPES[kind])


def test_goals_are_shapes_of_products_that_no_other_selection_has_time_for():
    goals = SHAPES["goals"]
    assert set(goals) <= {shapes for shapes, _ in roofline.OPERATORS.values()}
    assert {(n, n, n) for n in (2048, 4096, 8192, 16384)} <= set(goals["linear"])
    assert (65536, 768, 3072) in goals["ffn"] and (8192, 2304, 256000) in goals["linear_cross_entropy"]
    assert goals["head_options"] == [(4096, 4096, 128256)] and not SHAPES["cpu"]["head_options"]


def test_gradients_that_are_made_with_the_loss_are_timed_where_the_logits_fit(monkeypatch):
    """By stand-ins of matrices on a GPU that this machine may not have."""
    capability = [choices.HOPPER]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])

    def found(tokens: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        given = {"is_cuda": True, "device": torch.device("cuda"), "dtype": dtype, "element_size": lambda: 2}
        matrices = (SimpleNamespace(shape=(rows, 8), **given) for rows in (tokens, classes))
        calls = choices.gradients_at_once(lambda **asked: asked, *matrices)
        assert all(call() == {"recompute": False} for call in calls.values())
        return list(calls)

    assert found(4096, 128256) == ["llmengine cuda at once", "llmengine cuda sm90a at once"]
    assert not found(8192, 256000) and not found(4096, 128256, torch.float32)
    capability[0] = (8, 0)
    assert found(4096, 128256) == ["llmengine cuda at once"]


def test_losses_of_others_are_peers_of_a_gpus_heads(monkeypatch):
    """By a stand-in of Cut Cross-Entropy's package, and PyTorch's own, in chunks; on a CPU there is neither."""
    assert set(small("linear_cross_entropy").run) == {"llmengine", "torch"}
    plain = torch.nn.functional
    stand_in = SimpleNamespace(
        linear_cross_entropy=lambda e, c, targets: plain.cross_entropy(e @ c.T, targets), __spec__=object()
    )
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", stand_in)
    on_gpu = SimpleNamespace(is_cuda=True)
    for name in ("cut_cross_entropy", "torch_linear_cross_entropy"):
        find = getattr(sys.modules["llmengine.roofline.peers"], name)
        monkeypatch.setattr(sys.modules["llmengine.roofline.layers"], name, lambda x, find=find: find(on_gpu))
    case, expected = small("linear_cross_entropy"), {"llmengine", "torch", "cut-cross-entropy"}
    has_own = hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert set(case.run) == expected | ({"torch in chunks"} if has_own else set())
    for call in case.run.values():
        torch.testing.assert_close(call(*case.tensors), case.run["torch"](*case.tensors), rtol=1e-4, atol=1e-5)


def test_native_peak_counts_its_operations_and_scales_with_rounds():
    if load("cpu").unavailable is not None:
        pytest.fail("the native module is not built")
    module = importlib.import_module("llmengine._cpu")
    one, ten = torch.zeros(2, 1, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        unit = torch.empty(0, dtype=dtype)
        module.multiply_add_peak(unit=unit, rounds=1, flops=one)
        module.multiply_add_peak(unit=unit, rounds=10, flops=ten)
        assert one.item() > 0 and ten.item() == 10 * one.item()
        assert one.item() % torch.get_num_threads() == 0
        with pytest.raises(ValueError, match=r"rounds.*at least 1"):
            module.multiply_add_peak(unit=unit, rounds=0, flops=ten)
    with pytest.raises(ValueError, match="unit"):
        module.multiply_add_peak(unit=torch.empty(0, dtype=torch.float64), rounds=1, flops=ten)


def test_ceilings_are_rates():
    ceilings = roofline.measure_ceilings(CLOCK, [torch.float32, torch.bfloat16], small=True)
    assert ceilings.gbytes_per_s > 0 and all(rate > 0 for rate in ceilings.tflops.values())
    assert set(ceilings.as_json()["tflops"]) == {"fp32", "bf16"}


def test_rows_tell_both_passes_of_every_peer():
    rows = list(roofline.measure(small("ffn"), CLOCK, CEILINGS, backends=["reference", "cpu"], compiled=True))
    peers = ["llmengine reference", "llmengine cpu", "torch", "torch.compile"]
    assert [row["peer"] for row in rows] == peers * 2
    assert [row["pass"] for row in rows] == ["forward"] * 4 + ["forward + backward"] * 4
    for row in rows:
        moved, flops = row["gbytes_per_s"] * row["ms"] * 1e6, row["tflops"] * row["ms"] * 1e9
        assert row["percent"] == pytest.approx(100 * CEILINGS.floor_ms(torch.float32, moved, flops) / row["ms"])
    assert len(list(roofline.lines(rows))) == len(rows)


def test_a_demand_holds_for_the_backward_of_its_row(monkeypatch):
    ran: list[tuple[str, str | None]] = []
    dispatch = registry.dispatch
    monkeypatch.setattr(
        registry, "dispatch", lambda op, args: ran.append((op, registry.demanded())) or dispatch(op, args)
    )
    list(roofline.measure(small("softmax"), CLOCK, CEILINGS, backends=["reference"]))
    assert {op for op, _ in ran} == {"softmax_forward", "softmax_backward"}
    assert {demand for _, demand in ran} == {"reference"}


def test_a_peer_that_fails_is_a_row_and_the_others_go_on():
    case = small("softmax")

    def broken(x):
        raise NotImplementedError("no such kernel\nand much more")

    case.run["cudnn"] = broken
    rows = list(roofline.measure(case, CLOCK, CEILINGS))
    failed = [row for row in rows if "error" in row]
    assert [(row["peer"], row["error"]) for row in failed] == [("cudnn", "no such kernel")] * 2
    assert {row["peer"] for row in rows if "ms" in row} == {"llmengine", "torch"}
    assert any("no such kernel" in line for line in roofline.lines(rows))


class Late(roofline.Clock):
    """Tells an error of the call before, as a GPU does: at the first wait, or while it is timed."""

    def __init__(self, at: str):
        super().__init__("cpu", 0.0, alone=True)
        self.at, self.error = at, False

    def _told(self, at: str) -> None:
        if self.error and at == self.at:
            self.error = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")

    def wait(self) -> None:
        self._told("wait")

    def medians(self, calls):
        self._told("medians")
        return super().medians(calls)

    def peak_bytes(self, call):
        self._told("peak_bytes")
        return super().peak_bytes(call)


@pytest.mark.parametrize("at", ["wait", "medians", "peak_bytes"])
def test_an_error_that_is_told_late_is_a_row_too(at: str):
    case, clock = small("softmax"), Late(at)

    def broken(x):
        clock.error = True
        return x * 1.0

    case.run["broken"] = broken
    rows = list(roofline.measure(case, clock, CEILINGS))
    told = "CUDA error: an illegal memory access was encountered"
    assert [row["error"] for row in rows if row["peer"] == "broken"] == [told] * 2
    assert [row["peer"] for row in rows if "ms" in row] == ["llmengine", "torch"] * 2


def test_a_peer_is_run_where_it_is_wanted_and_asked_for_before():
    asked = []

    def wanted(which: str, peer: str) -> bool:
        asked.append((which, peer))
        return (which, peer) != ("forward", "torch")

    rows = list(roofline.measure(small("softmax"), roofline.Clock("cpu", 0.0, alone=True), CEILINGS, wanted=wanted))
    both = "forward + backward"
    assert [(row["pass"], row["peer"]) for row in rows] == [
        ("forward", "llmengine"),
        (both, "llmengine"),
        (both, "torch"),
    ]
    assert asked == [(which, peer) for which in ("forward", both) for peer in ("llmengine", "torch")]


def test_a_peer_without_a_gradient_is_timed_forward_alone():
    case = small("softmax")
    within = choices.Within(case.run["torch"], contextlib.nullcontext, has_gradient=False)
    case.run.clear()
    case.run["llmengine 8 bits"] = within
    rows = list(roofline.measure(case, CLOCK, CEILINGS))
    assert [row["pass"] for row in rows] == ["forward"] and "error" not in rows[0]


def test_flex_attention_is_compiled_where_pytorchs_call_is():
    case = small("attention")
    case.run["flex"] = case.run["torch"]
    peers = [{row["peer"] for row in roofline.measure(case, CLOCK, CEILINGS, compiled=c)} for c in (False, True)]
    assert peers == [{"llmengine", "torch"}, {"llmengine", "torch", "flex", "torch.compile"}]


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_only_kernels_that_take_the_call_are_timed_by_their_names(capability, head_dim, compiler, monkeypatch):
    """Else those that serve instead would be."""

    def load():
        if not compiler:
            raise choices.nvrtc.NvrtcError("not there")

    monkeypatch.setattr(choices.nvrtc, "load", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, 8, head_dim), device="cuda")
    found = {name.removeprefix("llmengine cuda ") for name in choices.attention_kernels(torch.relu, q)}
    hopper = {"sm90a", "fp8"} | ({"one pass"} if head_dim <= 128 else set()) if capability == (9, 0) else set()
    assert found == hopper | ({"exact"} if compiler and head_dim in (96, 192) else set())


def test_ratios_are_the_peers_time_over_ours():
    common = {"operator": "x", "case": "y", "dtype": "fp32", "pass": "forward", "limit": "memory"}
    rates = {"gbytes_per_s": 1.0, "tflops": 0.0, "percent": 50.0}
    rows = [common | rates | {"peer": "llmengine", "ms": 2.0}, common | rates | {"peer": "torch", "ms": 3.0}]
    ours, theirs = roofline.lines(rows)
    assert "1.50x" in theirs and "x" not in ours.rsplit("memory", 1)[1]


def test_machine_names_what_a_record_needs():
    facts = roofline.machine()
    assert facts["torch"] == torch.__version__ and facts["llmengine"] == llmengine.__version__
    assert re.fullmatch(r"[0-9a-f]{7,}", facts["commit"]) and facts["device"] == facts["processor"]
    assert facts["processor"] and facts["threads"] == torch.get_num_threads()


def test_plot_is_written_whole(tmp_path):
    rows = list(roofline.measure(small("ffn"), CLOCK, CEILINGS)) + list(
        roofline.measure(small("layer_norm", torch.bfloat16), CLOCK, CEILINGS)
    )
    roofline.draw(rows, CEILINGS, tmp_path / "bench.png", "title")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    roofline.draw([], CEILINGS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_each_peer_of_a_case_is_a_benchmark_by_itself(tmp_path):
    """`pytest benchmarks/ --benchmark-only`, as on a GPU, but for its shapes and peers."""
    options = f"--benchmark-only -k softmax --device cpu --shapes small --results {tmp_path / 'found.json'}"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_roofline.py", *options.split()]
    # Beside a worker's name pytest-benchmark would be off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"device", "commit"} <= found["machine"].keys()
    dtypes, passes = ("float32", "bfloat16"), ("forward", "forward + backward")
    assert {row["case"] for row in found["rows"]} == {f"softmax 5x48 {d} {p}" for d in dtypes for p in passes}
    for row in found["rows"]:
        assert row["percent"].keys() == row["peak_bytes"].keys() == row["ms"].keys() == {"llmengine", "torch"}
        assert all(share > 0 for share in row["percent"].values())
