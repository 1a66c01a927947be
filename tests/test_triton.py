"""Triton kernels where the samples of llmengine.testing do not lead: rows wider than a tile, grids that walk on."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

import llmengine
from llmengine import functional
from llmengine.backends.reference.adamw import stochastic_bfloat16
from llmengine.backends.triton import (
    adamw,
    attention_table,
    cross_entropy,
    device,
    gemm,
    linear_cross_entropy,
    norm,
    rows,
    tiles,
)
from llmengine.backends.triton.block_sparse import Kept, block_sparse_gemm
from llmengine.ops import adamw as node
from llmengine.testing import Operator, Sample, Target, all_operators, assert_law, evaluate, poison, targets
from llmengine.testing.law import GRADIENT, OUTPUT

ROOT = Path(__file__).resolve().parent.parent
TRITON = [t for t in targets() if t.backend == "triton"]
OPERATORS = {op.name: op for op in reversed(all_operators())}  # of one name the first: others are of its options


def assert_lawful(op: Operator, sample: Sample) -> None:
    for target in TRITON:
        for dtype in target.dtypes:
            given = sample.on(target.device).rounded(dtype)
            oracle = evaluate(op.function, given.rounded(torch.float64), "reference")
            plain = evaluate(op.plain or op.function, given, None if op.plain else "reference")
            with poison():
                ours = evaluate(op.function, given, "triton")
            for y, p, o in zip(ours[0], plain[0], oracle[0], strict=True):
                assert_law(y, p, o, OUTPUT, f"{op.name} {sample.name} {dtype}: output")
            for key in oracle[1]:
                assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{op.name} {dtype}: grad {key}")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Tiles so narrow that rows of a few hundred elements are swept: the interpreter is slow."""
    monkeypatch.setattr(rows, "WIDEST", 128)
    monkeypatch.setattr(norm, "BACKWARD_WIDEST", 64)
    monkeypatch.setattr(cross_entropy, "WIDEST", 64)


def test_there_is_a_triton_to_test():
    assert TRITON


@pytest.mark.parametrize("other, known", [("gfx90a", "gfx942"), ("gfx1100", "gfx942"), ("sm_86", "sm_80")])
def test_a_gpu_without_a_table_has_that_of_its_makers_smallest_shared_memory(other: str, known: str):
    assert attention_table.table(other) is attention_table.table(known)
    chosen = []
    for place in (other, known):
        with device.assume(place):
            x = torch.empty(8192, 4096, dtype=torch.float16, device="meta")
            chosen.append([tiles.slot_of(kind, x, x.T) for kind in ("plain", "fused", "pair", "ragged")])
    assert chosen[0] == chosen[1]


def test_a_program_may_take_all_registers_that_a_multiprocessor_has(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    for place, expected in (("sm_90", [255, 255, 128]), ("gfx942", [None] * 3)):
        with device.assume(place):
            options = [device.all_registers(torch.device("meta"), warps) for warps in (4, 8, 16)]
        assert [given.get("maxnreg") for given in options] == expected


SWITCHES = {
    "older": "matmul.allow_tf32 = True",
    "older, by name": "torch.set_float32_matmul_precision('high')",
    "newer": "matmul.fp32_precision = 'tf32'",
    "newer, of all": "torch.backends.fp32_precision = 'tf32'",
    "older, and back": "matmul.allow_tf32 = True; matmul.allow_tf32 = False",
    "newer, and back": "matmul.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'",
    "none": "pass",
}
PRECISIONS = """
import torch
import llmengine
from llmengine.backends.triton import device
matmul = torch.backends.cuda.matmul
{switch}
for place in ("sm_80", "sm_90", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100"):
    with device.assume(place):
        print(*(device.precision(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)))
x, w, target = torch.randn(3, 16), torch.randn(16, 16), torch.arange(3)
with llmengine.backend("triton"):
    llmengine.functional.ffn(x, w, w)
    llmengine.functional.linear_cross_entropy(x, w, target)
    llmengine.functional.scaled_dot_product_attention(*[torch.randn(1, 1, 4, 16)] * 3)
"""


@pytest.mark.skipif(not device.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("switch", SWITCHES)
def test_products_of_float32_follow_both_of_pytorchs_switches_where_the_gpu_has_tf32(switch: str):
    """In a process each: PyTorch takes it ill when both have been set."""
    script = PRECISIONS.format(switch=SWITCHES[switch])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    tf32 = ["ieee"] * 7 if "back" in switch or switch == "none" else ["tf32"] * 3 + ["ieee", "tf32", "ieee", "ieee"]
    assert done.stdout.split() == [word for of_float32 in tf32 for word in (of_float32, "ieee")]


def test_gpus_before_ampere_are_refused(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    old = "the GPU has compute capability 7.5; the kernels need 8.0"
    for capabilities, refused in (([(7, 5)], [old]), ([(8, 0), (7, 5)], [None, old]), ([(7, 5), (9, 0)], [old, None])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=capabilities: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, found=capabilities: found[i])
        monkeypatch.setattr(device, "too_old", functools.cache(device.too_old.__wrapped__))
        assert device.unavailable.__wrapped__() == (old if len(refused) == 1 else None)
        for number, reason in enumerate(refused):
            tensor = SimpleNamespace(is_cpu=False, device=torch.device("cuda", number), is_floating_point=bool)
            assert device.refuses_tensors(None, tensor) == reason


def option_values(sample: Sample) -> set[tuple]:
    """What a sample gives its operator: (option, kind of value)."""

    def kind(value):
        if isinstance(value, torch.Tensor):
            if value.dtype == torch.bool:
                return "mask" if value.any(-1).all() else "mask of rows without keys"
            return "bias of -inf" if value.isinf().any() else "bias"
        if isinstance(value, tuple):
            return tuple(side >= 0 for side in value)
        return value if isinstance(value, (bool, str)) else "number"

    return {(option, kind(value)) for option, value in sample.kwargs.items()}


def test_every_run_tries_each_option_value_of_attention_in_both_dtypes():
    """Those that five samples have; those that two have in one dtype at least."""
    slow = Target("triton", "cpu", (torch.float32, torch.float16), slow=True)
    given: Counter = Counter()
    tried: dict[torch.dtype, Counter] = {dtype: Counter() for dtype in slow.dtypes}
    cases = [(op, i, s) for op in OPERATORS.values() if op.node == "attention" for i, s in enumerate(op.samples())]
    for op, i, sample in cases:
        given.update(option_values(sample))
        for dtype in slow.dtypes:
            if slow.always_tries(op, i, dtype):
                tried[dtype].update(option_values(sample))
    several = {what for what, samples in given.items() if samples >= 5}
    assert {("attn_mask", kind) for kind in ("mask", "mask of rows without keys", "bias", "bias of -inf")} < several
    assert not {what for dtype in slow.dtypes for what in several if not tried[dtype][what]}
    assert not {what for what, n in given.items() if n >= 2 and not any(tried[dtype][what] for dtype in slow.dtypes)}
    runs = {dtype: sum(slow.always_tries(op, i, dtype) for op, i, _ in cases) for dtype in slow.dtypes}
    assert max(runs.values()) <= len(cases) / 5 and min(runs.values()) >= len(cases) / 7


def norm_sample(name: str, shape: tuple[int, int]) -> Sample:
    parameters = [randn(shape[1]), randn(shape[1]) + 1][: 1 if "rms" in name else 2]
    if name.startswith("add"):
        args = (randn(*shape), randn(*shape).flip(0), shape[1:], *parameters)
        return Sample(f"{shape}", args, {"eps": 1e-5, "dropout_p": 0.7})
    return Sample(f"{shape}", (randn(*shape) + 10, shape[1:], *parameters), {"eps": 1e-5})


NORMS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_wide_rows(name: str, narrow_tiles):
    assert_lawful(OPERATORS[name], norm_sample(name, (9, 300)))


def test_norm_with_more_tiles_than_resident_programs(monkeypatch):
    monkeypatch.setattr(norm, "RESIDENT_WARPS", 1)
    assert_lawful(OPERATORS["layer_norm"], norm_sample("layer_norm", (11, 1030)))


def test_softmax_of_wide_rows(narrow_tiles):
    assert_lawful(OPERATORS["softmax"], Sample("wide", (3 * randn(9, 300), 1)))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_of_wide_rows(reduction: str, narrow_tiles):
    target = torch.arange(70) * 4
    target[::3] = -100
    options = {
        "reduction": reduction,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 10.0,
        "weight": randn(300).abs(),
    }
    assert_lawful(OPERATORS["cross_entropy"], Sample("wide", (3 * randn(70, 300), target), options, ("weight",)))


def test_a_target_out_of_range_is_nan_where_waiting_to_say_so_would_cost():
    for target in TRITON:
        logits = randn(3, 5).float().to(target.device).requires_grad_()
        labels = torch.tensor([1, 5, -1], device=target.device)
        with llmengine.backend("triton"):
            losses = functional.cross_entropy(logits, labels, reduction="none")
            (grad,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isnan().tolist() == [False, True, True]
        assert grad.isnan().any(1).tolist() == [False, True, True]


def test_linear_cross_entropy_in_several_chunks_of_classes(monkeypatch):
    """Of the input's gradient a first, a middle and a last part."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 1)
    monkeypatch.setattr(linear_cross_entropy, "LEAST", 256)
    target = torch.arange(20) * 28
    target[:3] = -100
    options = {"linear_bias": randn(560), "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 10.0}
    sample = Sample("chunks", (randn(20, 24), randn(560, 24) / 2, target), options)
    assert_lawful(OPERATORS["linear_cross_entropy"], sample)


@pytest.mark.parametrize("sparse", [False, True], ids=["", "sparse"])
def test_sums_between_products_keep_24_bits_of_a_float32(sparse: bool):
    """64 products, that half of a result's 16 bits each time would lose; what is not finite stays so."""
    for target in TRITON:
        a, b = (t.to(target.device, torch.float16) for t in (randn(70, 16), randn(16, 40)))
        a[3, 0], a[5, 0] = torch.inf, torch.nan
        out = torch.empty(70, 40, dtype=torch.float16, device=target.device)
        low = torch.empty(70, 40, dtype=torch.uint8, device=target.device)
        whole = Kept(torch.ones(5, 1, dtype=torch.int32, device=target.device), 16, 16)
        for step in range(64):
            sums = {"out": out, "added": step > 0, "between": gemm.Between(low, step == 63)}
            block_sparse_gemm(a, whole, b, **sums) if sparse else gemm.gemm(a, b, **sums)
        exact = (64 * (a.double() @ b.double())).half()
        torch.testing.assert_close(out, exact, rtol=2**-10, atol=2**-10, equal_nan=True)
        finite = exact.isfinite()
        assert (out[finite] == exact[finite]).double().mean() > 0.8


def test_tiles_of_tokens_without_labels_are_skipped():
    """64 of the interpreter's tokens make a tile."""
    target = torch.full((150,), -100)
    target[70:80] = 3
    assert_lawful(OPERATORS["linear_cross_entropy"], Sample("gaps", (randn(150, 20), randn(9, 20), target)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_product_split_along_k(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(gemm, "SHORTEST", 1)
    for target in TRITON:
        a, b = (t.to(target.device, dtype) for t in (randn(300, 21).T, randn(300, 40)))
        assert gemm._parts(gemm.pick("plain", a, b), 21, 40, 300, 4) > 1
        exact = a.double() @ b.double()
        for out_dtype in (dtype, torch.float32):
            product = gemm.gemm(a, b, dtype=out_dtype)
            assert product.dtype == out_dtype
            assert (product - exact).abs().max() <= torch.finfo(out_dtype).eps * exact.abs().max() * 2


@triton.jit
def round_all(x, noise, out, N: tl.constexpr):
    places = tl.arange(0, N)
    bits = adamw.stochastic_bits(tl.load(x + places), tl.load(noise + places).to(tl.uint32))
    tl.store(out + places, bits.to(tl.int16, bitcast=True))


def test_stochastic_rounding_to_bfloat16():
    """By its bits, as the interpreter has no bfloat16."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    noise = torch.randint(0, 1 << 16, (1024,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    for target in TRITON:
        out = torch.empty(1024, dtype=torch.int16, device=target.device)
        round_all[(1,)](x.to(target.device), noise.to(target.device), out, N=1024)
        rounded = out.cpu().view(torch.bfloat16)
        torch.testing.assert_close(rounded, stochastic_bfloat16(x, noise), rtol=0, atol=0, equal_nan=True)


def stochastic_step(backend: str, device: str) -> list[torch.Tensor]:
    """Two bfloat16 weights, their moments and peaks after a step of which float32 holds all but quotients exactly."""
    g = torch.Generator().manual_seed(0)

    def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
        # of 12 bits, whose square has the 24 of a float32
        made = (torch.randint(2048, 4096, (size,), generator=g) / 2048 for size in (2500, 4096))
        return [tensor.to(device, dtype) for tensor in made]

    weights, gradients, *kept = (tensors(torch.float32 if i == 1 else torch.bfloat16) for i in range(5))
    steps = [torch.full((), 2.0, device=device) for _ in range(2)]
    with llmengine.backend(backend):
        node.adamw(
            weights, gradients, *kept, [], steps, [7, 2**31 - 1], torch.tensor(1 / 64, dtype=torch.float64), None, None,
            0.0, 0.0, 0.0, 0.0, False, True, -(2**40) - 5,
        )  # fmt: skip
    return [tensor.cpu() for tensors in (weights, *kept) for tensor in tensors]


def test_a_stochastic_step_is_the_references_bit_for_bit(monkeypatch):
    """All four draws. Of bfloat16 this step has loads, stores and widening alone, which the interpreter has right."""
    monkeypatch.setattr(adamw, "refuses_tensors", lambda *_: None)
    expected = stochastic_step("reference", "cpu")
    for target in (t for t in targets() if t.backend in ("triton", "cuda")):
        for i, (ours, theirs) in enumerate(zip(stochastic_step(target.backend, target.device), expected, strict=True)):
            if i < 2 and target.device == "cuda":  # a weight's quotient may be off by a last bit, that may carry
                assert (ours != theirs).double().mean() < 1e-3, target.backend
            else:
                assert torch.equal(ours, theirs), (target.backend, i)


def test_adamw_on_many_parameters_of_all_alignments():
    """As the reference; also where the table of addresses is used a second time."""
    for target in TRITON:
        results = []
        for backend in ("triton", "reference"):
            weights = [randn(n + 1).to(target.device, torch.float32)[n % 2 :] for n in range(0, 6000, 499)]
            optimizer = llmengine.optim.AdamW([w.requires_grad_() for w in weights], 0.1, amsgrad=True)
            for _ in range(2):
                for weight in weights:
                    weight.grad = weight.detach().clone()
                with llmengine.backend(backend):
                    optimizer.step()
            results.append([w.detach() for w in weights])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
