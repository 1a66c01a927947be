"""Attention beyond the general laws: random calls, packed against padded, memory, bad input."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmengine
from llmengine.functional import scaled_dot_product_attention, varlen_attention
from llmengine.testing import LAYOUTS, Sample, Target, all_operators, assert_law, evaluate, targets
from llmengine.testing.law import GRADIENT, OUTPUT

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = st.sampled_from([layout for name, layout in LAYOUTS.items() if name != "huge stride"])
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 128]))
LENGTHS = st.one_of(st.integers(1, 20), st.integers(90, 100), st.integers(185, 200))
# That of a table has few elements, of which each sums errors over rows: the laws' samples are made for it.
CONSTANTS = ("alibi_slopes", "distance_bias", "sinks")
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


CPU = Target("cpu", "cpu", (torch.float32, torch.bfloat16))
ATTENTION = next(operator for operator in all_operators() if operator.node == "attention")
ELSEWHERE = [t for t in targets() if t.backend != "cpu" and t.has(ATTENTION)]
OTHERS = [pytest.param(t, d, id=f"{t.backend}-{d}") for t in ELSEWHERE for d in t.dtypes]


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def options(draw, heads: int) -> dict:
    """What the padded and the packed function have in common."""
    chosen: dict = {"return_lse": True, "window_size": draw(st.tuples(st.integers(-1, 30), st.integers(-1, 30)))}
    chosen["causal"] = draw(st.sampled_from([None, "top_left", "bottom_right"]))
    chosen["scale"] = draw(st.sampled_from([None, 0.0, -0.3, 1.0]))
    chosen["softcap"] = draw(st.sampled_from([0.0, 0.0, 2.0]))
    chosen["dropout_p"] = draw(st.sampled_from([0.0, 0.0, 0.5]))
    if draw(st.booleans()):
        chosen["alibi_slopes"] = torch.linspace(0.01, 1, heads, dtype=torch.float64)
    if farthest := draw(st.sampled_from([0, 0, 10, 40, 250])):
        g = torch.Generator().manual_seed(farthest)
        chosen["distance_bias"] = randn(g, heads, 2 * farthest + 1)
    if chosen["window_size"][0] % 2:
        chosen["sinks"] = torch.linspace(-3, 3, heads, dtype=torch.float64)
    return chosen


@st.composite
def padded_calls(draw, lengths=LENGTHS, dims=DIMS, layout=LAYOUT) -> Sample:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, keys, dim, value_dim = draw(lengths), draw(lengths), draw(dims), draw(dims)
    # the law compares largest and mean errors: every gradient gets the elements that make them meaningful, of rows
    # enough, since the elements of one row share the error of its statistics
    batch = -(-256 // (min(rows, keys) * min(dim, value_dim, 8))) + draw(st.integers(0, 1))
    heads = key_heads * group
    chosen = draw(options(heads)) | {"enable_gqa": True}
    if draw(st.booleans()):
        mask = randn(g, *(n if draw(st.booleans()) else 1 for n in (batch, heads, rows, keys)))
        infinite = torch.where(torch.rand(mask.shape, generator=g) < 0.2, -torch.inf, mask)
        chosen["attn_mask"] = draw(LAYOUT)(draw(st.sampled_from([mask, mask > -0.5, infinite])))
    operands = [(batch, heads, rows, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim)]
    constants = tuple(name for name in CONSTANTS if name in chosen)
    return Sample("random", tuple(draw(layout)(randn(g, *shape)) for shape in operands), chosen, constants, constants)


@st.composite
def packed_calls(draw, most=5, dims=DIMS, layout=LAYOUT) -> Sample:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    lengths = [(13, 15), *draw(st.lists(st.tuples(st.integers(0, 110), st.integers(0, 110)), max_size=most - 1))]
    dim, value_dim, spare = draw(dims) + 8, draw(dims) + 8, draw(st.integers(0, 3))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in zip(*lengths, strict=True))
    rows, keys = int(cu_q[-1]) + spare, int(cu_k[-1]) + spare
    shapes = [(rows, key_heads * group, dim), (keys, key_heads, dim), (keys, key_heads, value_dim)]
    chosen = draw(options(key_heads * group))
    constants = tuple(name for name in CONSTANTS if name in chosen)
    operands = (draw(layout)(randn(g, *shape)) for shape in shapes)
    longest = (max(q for q, _ in lengths), max(k for _, k in lengths))
    return Sample("random", (*operands, cu_q, cu_k, *longest), chosen, constants, constants)


def assert_equals_oracle(
    function, sample: Sample, dtype: torch.dtype, target: Target = CPU, assert_lse: Callable[..., None] | None = None
) -> None:
    rounded = sample.on(target.device).rounded(dtype)
    oracle = evaluate(function, rounded.rounded(torch.float64), "reference")
    plain, ours = (evaluate(function, rounded, backend) for backend in ("reference", target.backend))
    for i in range(len(ours[0])):
        if i == 1 and assert_lse:
            assert_lse(*(outputs[1].double() for outputs, _ in (ours, plain, oracle)))
            continue
        assert_law(ours[0][i], plain[0][i], oracle[0][i], OUTPUT, f"{sample} output {i}")
    for key in ours[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample} grad {key}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SETTINGS
@given(sample=padded_calls())
def test_random_padded_calls(dtype, sample):
    assert_equals_oracle(scaled_dot_product_attention, sample, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SETTINGS
@given(sample=packed_calls())
def test_random_packed_calls(dtype, sample):
    assert_equals_oracle(varlen_attention, sample, dtype)


@pytest.mark.parametrize("target, dtype", OTHERS)
@settings(SETTINGS, max_examples=2)  # where Triton is interpreted, every program takes a hundredth of a second
@given(padded=padded_calls(st.integers(50, 140)), packed=packed_calls(2))
def test_random_calls_elsewhere(target, dtype, padded, packed):
    assert_equals_oracle(scaled_dot_product_attention, padded, dtype, target)
    assert_equals_oracle(varlen_attention, packed, dtype, target)


@pytest.mark.heavy
@pytest.mark.parametrize("target, dtype", OTHERS)
@SETTINGS
@given(padded=padded_calls(), packed=packed_calls())
def test_many_random_calls_elsewhere(target, dtype, padded, packed):
    assert_equals_oracle(scaled_dot_product_attention, padded, dtype, target)
    assert_equals_oracle(varlen_attention, packed, dtype, target)


@pytest.mark.parametrize("target", ELSEWHERE, ids=lambda t: t.backend)
def test_every_backend_drops_the_elements_that_the_cpu_drops(target):
    """Where all scores are equal, the output for a unit matrix of values shows who was kept, and so does its gradient
    for a unit matrix of upstream gradients."""
    batch, heads, rows, keys = 2, 2, 70, 75
    found = []
    for t in (CPU, target):
        query, key = torch.zeros(batch, heads, rows, 4), torch.zeros(batch, heads, keys, 4)
        query, key, value = (x.to(t.device) for x in (query, key, torch.eye(keys).expand(batch, heads, keys, keys)))
        value.requires_grad_()
        with llmengine.backend(t.backend):
            torch.manual_seed(11)
            kept = scaled_dot_product_attention(query, key, value, dropout_p=0.4)
            upstream = torch.eye(rows, keys, device=t.device).expand_as(kept)
            (grad,) = torch.autograd.grad(kept, value, upstream)
        assert 0.3 < (kept == 0).float().mean() < 0.5
        assert torch.equal(grad[..., :rows] != 0, kept.mT != 0)
        found.append(kept.cpu() != 0)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_equals_padded_bit_by_bit(dtype, dropout_p, is_causal):
    """Dropout included: an element's draw knows its sequence, head, row and key, not where they lie."""
    lengths, heads, dim = [100, 7, 193, 64], 4, 32
    longest = max(lengths)
    packed = [torch.randn(sum(lengths), heads, dim).to(dtype).requires_grad_() for _ in range(3)]
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "distance_bias": torch.randn(heads, 41)}
    options["sinks"] = torch.randn(heads)
    grad = torch.randn(sum(lengths), heads, dim).to(dtype)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    seen = torch.arange(longest) < torch.tensor(lengths)[:, None]  # (batch, tokens)

    def pad(x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(len(lengths), longest, heads, dim)
        out[seen] = x.detach()
        return out.transpose(1, 2)

    padded = [pad(x).requires_grad_() for x in packed]
    with llmengine.backend("cpu"):
        torch.manual_seed(3)
        ours = varlen_attention(*packed, cu, cu, longest, longest, **options)
        torch.manual_seed(3)
        theirs = scaled_dot_product_attention(*padded, attn_mask=seen[:, None, None], **options)
        assert torch.equal(ours, theirs.transpose(1, 2)[seen])
        ours = torch.autograd.grad(ours, packed, grad)
        theirs = torch.autograd.grad(theirs, padded, pad(grad))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b.transpose(1, 2)[seen])


@pytest.mark.parametrize("farthest", [0, 5, 100, 400])
@pytest.mark.parametrize("group", [1, 2])
def test_bias_by_distance_is_a_dense_mask_that_packed_sequences_share(farthest, group):
    """Against a mask gathered from the table for every sequence, whose gradient PyTorch takes back to the table."""
    rows, keys, heads, dim = [150, 1, 90, 260], [150, 30, 40, 300], 4, 24
    table = torch.randn(heads, 2 * farthest + 1, requires_grad=True)
    shapes = [(sum(rows), heads, dim), *[(sum(keys), heads // group, dim)] * 2]
    packed = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(sum(rows), heads, dim), torch.randn(heads, sum(rows))
    cu = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (rows, keys)]
    options = {"is_causal": True, "window_size": (200, -1), "return_lse": True}

    def one(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x[c[n] : c[n + 1]].transpose(0, 1) for x, c in zip(packed, (cu[0], cu[1], cu[1]), strict=True))
        distance = torch.arange(keys[n]) - torch.arange(rows[n])[:, None] - (keys[n] - rows[n])
        mask = table[:, distance.clamp(-farthest, farthest) + farthest]
        more = {"causal": "bottom_right", "window_size": (200, -1), "return_lse": True, "enable_gqa": True}
        return scaled_dot_product_attention(q, k, v, mask, **more)

    with llmengine.backend("cpu"):
        ours = varlen_attention(*packed, *cu, max(rows), max(keys), distance_bias=table, **options)
        outputs, logarithms = zip(*map(one, range(len(rows))), strict=True)
        theirs = torch.cat([x.transpose(0, 1) for x in outputs]), torch.cat(logarithms, dim=1)
        both = [[*r, *torch.autograd.grad(r, [*packed, table], upstream)] for r in (ours, theirs)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_bias_by_distance_takes_memory_linear_in_the_tokens():
    """Far more entries than any sequence has distances: each sequence keeps sums of those alone."""
    script = """
import torch
from llmengine.functional import varlen_attention
q, k, v = (torch.randn(4000, 2, 4, requires_grad=True) for _ in range(3))
cu = torch.arange(0, 4001, 4, dtype=torch.int32)
def run(farthest):
    table = torch.zeros(2, 2 * farthest + 1, requires_grad=True)
    varlen_attention(q, k, v, cu, cu, 4, 4, distance_bias=table).sum().backward()
    assert table.grad[:, farthest - 3 : farthest + 4].all() and table.grad.count_nonzero() == 14
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss is also the parent's
small = run(10)
print(run(100000) - small)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(out.stdout) < 64 << 10, f"{out.stdout.strip()} KiB more"


@pytest.mark.parametrize("shape", [(1, 1, 1000, 64), (2, 3, 300, 40)], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_thread_counts_change_no_bit(shape, group):
    """The first shape has one key head: its rows are shared out among tasks, whose sums have a fixed order."""
    batch, heads, rows, dim = shape
    args = [torch.randn(batch, h, rows, dim, requires_grad=True) for h in (heads * group, heads, heads)]
    mask = torch.randn(1, 1, rows, rows, requires_grad=True)
    bias, sinks = (torch.randn(heads * group, *n, requires_grad=True) for n in [(65,), ()])
    grad, results, threads = torch.randn(batch, heads * group, rows, dim), [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            with llmengine.backend("cpu"):
                output = scaled_dot_product_attention(
                    *args, mask, is_causal=True, enable_gqa=True, distance_bias=bias, sinks=sinks
                )
                results.append([output, *torch.autograd.grad(output, [*args, mask, bias, sinks], grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def growing(dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Operands of which every 32 keys have logits far beyond those of the keys before, for some rows of either sign."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (randn(generator, 1, 2, 300, dim) for _ in range(4))
    k *= (1 + torch.arange(300) // 32 * 6)[:, None]
    q[:, :, ::3] *= 0.01
    return [x.to(torch.bfloat16) for x in (q, k, v)], grad.to(torch.bfloat16)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_logits_that_outgrow_all_before_them(dim, is_causal):
    operands, grad = growing(dim)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        output = function(*leaves, is_causal=is_causal)
        return output, *torch.autograd.grad(output, leaves, grad.to(dtype))

    plain = torch.nn.functional.scaled_dot_product_attention
    results = zip(
        run(scaled_dot_product_attention, torch.bfloat16), run(plain, torch.bfloat16), run(plain, torch.float64),
        strict=True,
    )  # fmt: skip
    for i, (ours, theirs, oracle) in enumerate(results):
        assert_law(ours, theirs, oracle, GRADIENT if i else OUTPUT, f"result {i}")


@pytest.mark.parametrize("what", [0.01, torch.inf, torch.nan])
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_do_not_depend_on_their_neighbours(dim, what):
    (q, k, v), _ = growing(dim)
    others = q.clone()
    others[:, :, 1::2] *= what
    with llmengine.backend("cpu"):
        ours, theirs = (scaled_dot_product_attention(x, k, v) for x in (q, others))
    assert torch.equal(ours[:, :, ::2], theirs[:, :, ::2])
    assert torch.equal(theirs[:, :, 1::2].isnan().all(), torch.tensor(what != 0.01))


def test_fully_masked_rows_give_zeros_and_no_gradients():
    q, k, v = (torch.randn(2, 3, 50, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool)
    mask[0, :, 20:30] = False
    with llmengine.backend("cpu"):
        output, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
        grads = torch.autograd.grad([output, lse], [q, k, v], [torch.randn_like(output), torch.randn_like(lse)])
    assert (output[0, :, 20:30] == 0).all() and (lse[0, :, 20:30] == -torch.inf).all()
    assert (grads[0][0, :, 20:30] == 0).all()
    assert all(g.isfinite().all() for g in (output, *grads)) and lse[1].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_where_a_row_sees_no_key_its_sink_takes_all(name):
    """Output 0 and lse the sink, whose gradient is that of lse; tokens after the last sequence have no sink."""
    q, k, v = (torch.randn(7, 3, 16, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    cu_q, cu_k = cu(0, 4, 6), cu(0, 0, 5)  # the first sequence has no keys, and a token follows the second
    with llmengine.backend(name):
        output, lse = varlen_attention(q, k, v, cu_q, cu_k, 4, 5, sinks=sinks, return_lse=True)
        upstream = torch.randn_like(output[:4]), torch.randn_like(lse)
        grads = torch.autograd.grad(
            [output[:4], lse], [q, sinks], [upstream[0], torch.where(torch.arange(7) == 5, 0, upstream[1])]
        )
    assert (output[:4] == 0).all() and (lse[:, :4] == sinks[:, None]).all()
    assert (output[6] == 0).all() and (lse[:, 6] == -torch.inf).all()
    assert (grads[0][:4] == 0).all() and (grads[0][5:] == 0).all()
    share = torch.exp(sinks[:, None] - lse[:, 4:5])  # of the row that has keys and a gradient of lse
    torch.testing.assert_close(grads[1], upstream[1][:, :4].sum(1) + (share * upstream[1][:, 4:5]).sum(1))


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_what_comes_after_the_last_sequence_is_nothing_to_a_sink(name):
    """Gradients of tokens of no sequence may be anything: a loss that leaves them out may leave NaN there."""
    device = next((t.device for t in targets() if t.backend == name), "cpu")
    q, k, v = (torch.randn(7, 3, 16, device=device, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([-2.0, 0.0, 3.0], device=device, requires_grad=True)
    boundaries = cu(0, 4, 6).to(device)
    upstream = torch.randn(7, 3, 16, device=device)
    results = []
    for beyond in (0.0, torch.nan):
        upstream[6] = beyond
        with llmengine.backend(name):
            output = varlen_attention(q, k, v, boundaries, boundaries, 4, 4, is_causal=True, sinks=sinks)
            results.append(torch.autograd.grad(output, [q, k, v, sinks], upstream))
    for without, spoilt in zip(*results, strict=True):
        assert spoilt.isfinite().all() and torch.equal(spoilt, without)


def test_a_sink_of_zero_adds_one_to_the_denominator():
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    weights = torch.exp(q @ k.mT / 8**0.5)
    with llmengine.backend("cpu"):
        output = scaled_dot_product_attention(q, k, v, sinks=torch.zeros(3))
    torch.testing.assert_close(output, weights @ v / (1 + weights.sum(-1, keepdim=True)))


@pytest.mark.parametrize("argument", range(3))
@pytest.mark.parametrize(
    "backend", ["cpu", *(t.backend for t in ELSEWHERE if (t.backend, t.device) == ("triton", "cpu"))]
)
def test_offsets_beyond_2_to_the_31(backend, argument):
    """In each of the strides in turn, forward and backward; the memory in between is virtual."""
    operands, upstream = [torch.randn(3, 4, 5, 8) for _ in range(3)], torch.randn(3, 4, 5, 8)

    def results(given):
        leaves = [x.detach().requires_grad_() for x in given]
        with llmengine.backend(backend):
            output = scaled_dot_product_attention(*leaves)
            return output, *torch.autograd.grad(output, leaves, upstream)

    expected = results(operands)
    for dim in range(3):
        shape = operands[argument].shape
        stride = [8 * 5 * 4, 8 * 5, 8, 1]
        stride[dim] = 2**31 // (shape[dim] - 1) + 8
        storage = torch.empty(sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1)
        far = storage.as_strided(shape, stride).copy_(operands[argument])
        torch.testing.assert_close(results([far if i == argument else x for i, x in enumerate(operands)]), expected)


def test_memory_is_linear_in_the_length():
    """One score matrix of this call would take 4 GiB, in bits 128 MiB; sums of all keys for each of 16 tasks 64 MiB."""
    script = """
import torch
from llmengine.functional import scaled_dot_product_attention
torch.set_num_threads(2)
def run(length):
    q, k, v = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
    scaled_dot_product_attention(q, k, v, window_size=(2000, 0), dropout_p=0.1).sum().backward()
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss is also the parent's
small = run(1024)
print(run(32768) - small)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(out.stdout) < 16 << 10, f"{out.stdout.strip()} KiB more"


@pytest.mark.parametrize("rows, keys", [(700, 900), (900, 700), (1000, 1000)])
@pytest.mark.parametrize("window", [(20, 10), (0, 0), (300, 0), (100, -1)])
def test_gradients_of_long_windows_whose_rows_are_dealt_out_in_runs(rows: int, keys: int, window: tuple[int, int]):
    """One key head, so that tasks share its rows; each has sums for the keys alone that its own rows see."""
    torch.manual_seed(rows + keys)
    given = [torch.randn(1, heads, n, 8) for heads, n in ((4, rows), (1, keys), (1, keys))]
    results = []
    for backend in ("cpu", "reference"):
        q, k, v = (t.clone().requires_grad_() for t in given)
        with llmengine.backend(backend):
            options = {"causal": "bottom_right", "window_size": window, "enable_gqa": True}
            y = scaled_dot_product_attention(q, k, v, **options)
            y.square().sum().backward()
        results.append((y, q.grad, k.grad, v.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def good() -> dict:
    return {name: torch.randn(2, 4, 6, 8) for name in ("query", "key", "value")}


SDPA_ERRORS = {
    "no tensor": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "integers": ({"key": torch.ones(2, 4, 6, 8, dtype=torch.int64)}, ValueError, "key has dtype int64; allowed: float"),
    "two dtypes": ({"value": torch.randn(2, 4, 6, 8).bfloat16()}, ValueError, "value has dtype bfloat16 but query has"),
    "head_dim": ({"key": torch.randn(2, 4, 6, 9)}, ValueError, "key has head_dim 9 but query has 8"),
    "tokens": ({"value": torch.randn(2, 4, 5, 8)}, ValueError, "value has 5 tokens but key has 6"),
    "heads": ({"key": torch.randn(2, 3, 6, 8)}, ValueError, "do not broadcast; enable_gqa=True"),
    "groups": (
        {"key": torch.randn(2, 3, 6, 8), "value": torch.randn(2, 3, 6, 8), "enable_gqa": True},
        ValueError, "query has 4 heads, which is no multiple of the 3 heads",
    ),
    "mask shape": ({"attn_mask": torch.ones(5, 6)}, ValueError, r"attn_mask has shape \(5, 6\), which does not broad"),
    "mask dtype": ({"attn_mask": torch.ones(6, 6).int()}, ValueError, "attn_mask has dtype int32; allowed: bool"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be finite and at least 0, got -1.0"),
    "causal": ({"causal": "left"}, ValueError, "causal must be None, 'top_left' or 'bottom_right', got 'left'"),
    "window": ({"window_size": (3,)}, ValueError, r"window_size must be \(left, right\).*got \(3,\)"),
    "table": ({"distance_bias": torch.ones(4, 6)}, ValueError, r"distance_bias has shape \(4, 6\); expected \(4, 2"),
    "table heads": ({"distance_bias": torch.ones(2, 5)}, ValueError, r"distance_bias has shape \(2, 5\); expected \(4"),
    "table dtype": ({"distance_bias": torch.ones(4, 5).half()}, ValueError, "distance_bias has dtype float16; allowed"),
    "sinks": ({"sinks": torch.zeros(1, 4)}, ValueError, r"sinks has shape \(1, 4\); expected \(4,\), one per"),
    "sinks dtype": ({"sinks": torch.zeros(4).double()}, ValueError, "sinks has dtype float64; allowed: float32"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes has shape \(3,\); expected \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", SDPA_ERRORS)
def test_bad_input_is_named(case):
    changes, error, message = SDPA_ERRORS[case]
    with pytest.raises(error, match=f"scaled_dot_product_attention: .*{message}"):
        scaled_dot_product_attention(**(good() | changes))


def cu(*ends: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(ends, dtype=dtype)


VARLEN_ERRORS = {
    "shape": ({"query": torch.randn(1, 10, 2, 8)}, r"query has shape \(1, 10, 2, 8\); expected \(tokens, heads, head"),
    "dtype": ({"cu_seqlens_q": cu(0, 4, 10, dtype=torch.int64)}, r"cu_seqlens_q must be int32 of .*got int64 \(3,\)"),
    "count": ({"cu_seqlens_k": cu(0, 10)}, "cu_seqlens_k has 2 boundaries but cu_seqlens_q has 3"),
    "begin": ({"cu_seqlens_q": cu(1, 4, 10)}, "cu_seqlens_q must begin with 0, got 1"),
    "falls": ({"cu_seqlens_k": cu(0, 6, 2)}, "cu_seqlens_k gives sequence 1 -4 tokens: it must never fall"),
    "beyond": ({"cu_seqlens_q": cu(0, 5, 11)}, "cu_seqlens_q ends at 11, past the 10 tokens"),
    "maximum": ({"max_seqlen_q": 5}, "cu_seqlens_q gives sequence 1 6 tokens, above its maximum 5"),
    "negative": ({"max_seqlen_k": -1}, "max_seqlen_k must be at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", VARLEN_ERRORS)
def test_bad_boundaries_are_named(case):
    changes, message = VARLEN_ERRORS[case]
    arguments = {name: torch.randn(10, 2, 8) for name in ("query", "key", "value")}
    arguments |= {"cu_seqlens_q": cu(0, 4, 10), "cu_seqlens_k": cu(0, 4, 10), "max_seqlen_q": 6, "max_seqlen_k": 6}
    with llmengine.backend("cpu"), pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        varlen_attention(**(arguments | changes))
