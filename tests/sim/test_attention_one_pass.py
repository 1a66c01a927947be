"""Hopper's attention, backward in one pass (csrc/cuda/attention_sm90a_{one_pass,grid}.cu), in the simulator: samples of
all options, the edges of its tiles, equal bits under every schedule, outliers for which the grid is too coarse, NaN and
infinities, neighbours that are not numbers, who takes a call, and lines broken.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.cuda.native import ATTENTION, ATTENTION_BACKWARD, Native, attention_backward_by
from llmengine.testing import Operator, Sample, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT
from llmengine.testing.samples import attention
from llmengine.testing.simulator import SCHEDULES

from .harness import loaded, schedule
from .test_attention import HALVES, HEAVY, SDPA, assert_right, sample_of
from .test_attention_sm90a import PLACES, broken, lined_up
from .test_attention_sm90a_backward import EDGES, MASKS, gradients, try_attention

ONE_PASS = "attention_backward_one_pass"


@pytest.fixture(autouse=True)
def asked_for(request, monkeypatch):
    schedule(request)
    monkeypatch.setenv(ATTENTION, "sm90a")
    monkeypatch.setenv(ATTENTION_BACKWARD, "one_pass")


class Ran(list[str]):
    """The kernels that ran; of how many tiles the last pass over the grid left queries to those of two passes; whether
    it added a mask's gradient up on integers, and whether it left that to them."""

    remade, on_integers, left = 0, False, False


@pytest.fixture
def ran(monkeypatch) -> Ran:
    names, call = Ran(), Native.call

    def noted(self, kernel, on, **arguments):
        call(self, kernel, on, **arguments)
        names.append(kernel)
        if "remade" in arguments:
            names.remade = int(arguments["remade"][0])
            names.on_integers = arguments["mask_sums"] is not None
            names.left = names.on_integers and bool(arguments["mask_bounds"][-1])

    monkeypatch.setattr(Native, "call", noted)
    return names


def cases() -> list:
    """A twelfth of the samples, each in one dtype; the others on demand."""
    return [
        pytest.param(op, s, HALVES[i.bit_count() % 2], id=f"{op.name}-{s.name}", marks=HEAVY if i % 12 != 5 else ())
        for op in attention.OPERATORS
        for i, s in enumerate(op.samples())
    ]


@pytest.mark.parametrize("op, sample, dtype", cases())
@PLACES
def test_samples_of_all_options(op: Operator, sample: Sample, dtype: torch.dtype, backend: str, ran: Ran):
    assert_right(op, sample, dtype, lined_up, backend)
    told = all(t.numel() > 0 for t in sample.args[:3]) and "broadcast" not in sample.name  # whose strides are 0
    narrow = max(t.shape[-1] for t in sample.args[:3]) <= 128
    by_hopper = ONE_PASS if narrow else "attention_backward_sm90a"
    assert ran[-1] == (by_hopper if told else "attention_backward")


@pytest.mark.parametrize(
    "dim, rows, keys", [pytest.param(*e, marks=HEAVY if i % 3 else ()) for i, e in enumerate(EDGES)]
)
@PLACES
def test_edges_of_tiles(dim: int, rows: int, keys: int, backend: str, ran: Ran):
    number = EDGES.index((dim, rows, keys))
    for i in (number % 6, (number + 3) % 6):
        heads, key_heads = (4, 2) if rows * keys < 3000 else (2, 1)
        sample = sample_of(f"{MASKS[i]}", rows, keys, dim, heads, key_heads, return_lse=True, **MASKS[i])
        assert_right(SDPA, sample, HALVES[(i + number) % 2], backend=backend)
    assert ran.count(ONE_PASS) == 2


def test_the_grid_is_fine_enough_for_what_is_usual(ran: Ran):
    for dim, dtype in ((64, torch.bfloat16), (96, torch.bfloat16), (128, torch.float16)):
        assert_right(SDPA, sample_of("full", 256, 300, dim, 2, 1), dtype)
        assert ran[-1] == ONE_PASS and ran.remade == 0


def test_what_lies_behind_the_last_key_makes_no_tile_anew(ran: Ran):
    """Zeros, whose scores of 0 are far above the logarithms of rows' sums, -15 and -95: float16 has no e^15, no float
    e^95."""
    for score, dtype in ((-20.0, torch.float16), (-100.0, torch.bfloat16)):
        sample = sample_of("far below", 70, 140, 40, 2, 1, scale=1.0)
        query, key = sample.args[:2]
        query[..., 0], key[..., 0] = 1.0, score
        query[..., 1:], key[..., 1:] = query[..., 1:] / 8, key[..., 1:] / 8
        assert_right(SDPA, sample, dtype)
        assert ran[-1] == ONE_PASS and ran.remade == 0


@pytest.mark.parametrize("dim", [24, 72])
def test_equal_bits_whatever_the_order_of_blocks_and_warps(dim: int, ran: Ran):
    """Three multiprocessors draw twelve tiles of keys, each as the schedule lets it."""
    from llmengine import _cuda_sim

    given = sample_of("schedules", 140, 390, dim, 4, 4, causal="bottom_right").rounded(torch.bfloat16)
    results = []
    for order, seed in [*((order, 11) for order in SCHEDULES), ("random", 12), ("random", 13)]:
        _cuda_sim.set_schedule(order, seed)
        with poison():
            results.append(list(evaluate(SDPA.function, given, "cuda_sim")[1].values()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert ran.count(ONE_PASS) == len(results) and ran.remade == 0


# ---- masks -----------------------------------------------------------------------------------------------------------


def masked(dim: int, shape: tuple[int, ...], **options) -> Sample:
    """Two sequences, two heads; some keys are hidden from a row by the mask."""
    m = attention._Maker(dim + len(shape))
    mask = m.randn(*shape).masked_fill(m.chance(*shape, p=0.1), -torch.inf)
    m.padded("x".join(map(str, shape)), 2, 2, 40, 140, dim, dim, 1, attn_mask=mask, **options)
    return m.samples[0]


@pytest.mark.parametrize("dim", [40, pytest.param(88, marks=HEAVY), pytest.param(104, marks=HEAVY)])
@pytest.mark.parametrize(
    "shape, on_integers",
    [((2, 2, 40, 140), False), ((2, 1, 40, 140), True), ((2, 40, 140), True), ((40, 140), True), ((1, 140), False)],
    ids=["scores", "heads-share", "sequences-share", "all-share", "rows-share"],
)
def test_gradients_of_masks(dim: int, shape: tuple[int, ...], on_integers: bool, ran: Ran):
    options = ({}, {"softcap": 2.0, "dropout_p": 0.2}, {"window_size": (40, 90)})[(dim + len(shape)) // 2 % 3]
    assert_right(SDPA, masked(dim, shape, **options), HALVES[dim % 16 > 0])
    assert ran[-1] == ONE_PASS and ran.on_integers == on_integers and not ran.left


@pytest.mark.parametrize("dim", [40, pytest.param(104, marks=HEAVY)])
def test_equal_bits_of_a_mask_that_heads_and_sequences_share(dim: int, ran: Ran):
    from llmengine import _cuda_sim

    given = masked(dim, (40, 140)).rounded(torch.bfloat16)
    results = []
    for order in SCHEDULES:
        _cuda_sim.set_schedule(order, 5)
        with poison():
            results.append(list(evaluate(SDPA.function, given, "cuda_sim")[1].values()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert ran.count(ONE_PASS) == len(results) and ran.on_integers and not ran.left


def test_a_mask_with_a_term_that_is_no_number_is_left_to_two_passes(ran: Ran):
    g = torch.Generator().manual_seed(8)
    tensors = [torch.randn(1, 2, 40, 40, generator=g).bfloat16() for _ in range(4)]
    mask = torch.randn(40, 40, generator=g).bfloat16()
    for which, strange in ((2, torch.nan), (3, torch.inf)):
        mixed = [t.clone() for t in tensors]
        mixed[which][0, 1, 33, 5] = strange
        found = []
        for passes in ("one_pass", "two_pass"):
            given = mask.clone().requires_grad_()
            with attention_backward_by(passes), llmengine.backend("cuda_sim"), poison():
                y = functional.scaled_dot_product_attention(*mixed[:3], given)
                found.append(torch.autograd.grad(y, given, mixed[3])[0])
            assert ran.left
        one, two = found
        assert two.isnan().any() and torch.equal(one.isnan(), two.isnan()) and torch.equal(one.isinf(), two.isinf())


# ---- outliers --------------------------------------------------------------------------------------------------------


def assert_gradients_right(sample: Sample, dtype: torch.dtype, upstream=None) -> None:
    given = sample.rounded(dtype)
    oracle = evaluate(SDPA.function, given.rounded(torch.float64), "reference", upstream)[1]
    plain = evaluate(SDPA.plain, given, "reference", upstream)[1]
    with poison():
        ours = evaluate(SDPA.function, given, "cuda_sim", upstream)[1]
    for key in ours:
        assert_law(ours[key], plain[key], oracle[key], GRADIENT, f"{sample.name} {dtype}: grad {key}")


def outlier(sample: Sample, which: int, by: float) -> Sample:
    """One key, or value, of the first head far above the others."""
    sample.args[which][0, 0, 77] *= by
    return sample


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("which, by", [(1, 3e3), (2, 3e3), (1, 30.0), (2, 30.0)])
def test_outliers_among_keys_and_values(which: int, by: float, dtype: torch.dtype, ran: Ran):
    assert_gradients_right(outlier(sample_of(f"{which} by {by}", 140, 200, 40, 2, 1), which, by), dtype)
    assert ran[-1] == ONE_PASS


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_key_that_nobody_looks_at_makes_the_grid_too_coarse_and_tiles_are_made_anew(dtype: torch.dtype, ran: Ran):
    """It is opposed to all queries, and 10^4 times as long as others."""
    sample = sample_of("unseen outlier", 140, 200, 40, 2, 2)
    query, key = sample.args[:2]
    query[..., 0] = query[..., 0].abs() + 1.0
    key[0, 0, 5] = 0.0
    key[0, 0, 5, 0] = -3e4
    assert_gradients_right(sample, dtype)
    assert ran.remade == 2  # of one head the rows; the other has no such key


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_outputs_of_all_sizes(dtype: torch.dtype, ran: Ran):
    """Every row has steps of its own: rows of 10^-4 and 10^4 beside each other."""

    def upstream(output: Tensor) -> Tensor:
        rows = torch.arange(output.shape[2])[:, None] % 9 - 4
        g = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        return (g * 10.0 ** (rows if dtype == torch.bfloat16 else rows / 2)).to(output)

    sample = sample_of("rows", 140, 200, 40, 2, 1, is_causal=True)
    assert_gradients_right(sample, dtype, upstream)
    given = sample.rounded(dtype)
    oracle = evaluate(SDPA.function, given.rounded(torch.float64), "reference", upstream)[1][0]
    ours = evaluate(SDPA.function, given, "cuda_sim", upstream)[1][0]
    error, most = ((x.double().abs().amax(-1)[..., 16:]) for x in (ours - oracle, oracle))
    assert (error <= 0.05 * most).all()
    assert ran[-1] == ONE_PASS


# ---- what is no number -----------------------------------------------------------------------------------------------


STRANGE = [
    pytest.param(which, x, marks=() if which == i else HEAVY)
    for which in range(4)
    for i, x in enumerate((torch.nan, torch.inf, -torch.inf, torch.nan))
    if i < 3 or which == 3
]


@pytest.mark.parametrize("which, strange", STRANGE)
def test_what_is_no_number_is_none_in_the_rows_that_it_reaches(which: int, strange: float, ran: Ran):
    """One element of queries, keys, values or gradients: where plain PyTorch's float64 has NaN or infinities, so do we,
    and other heads are as they are without it. So are tiles of rows above one of a row's; a key or a value that is no
    number is none for rows that it is hidden from, too, as in plain PyTorch: it multiplies their zeros."""
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(1, 2, 280, 40, generator=g).bfloat16() for _ in range(4)]
    tensors[which][0, 0, 150, 3] = strange
    clean = [t.nan_to_num(0.5, 0.5, 0.5) for t in tensors]
    found, without = (
        gradients(functional.scaled_dot_product_attention, x[:3], x[3], is_causal=True) for x in (tensors, clean)
    )
    wide = [t.double().requires_grad_() for t in tensors[:3]]
    with llmengine.backend("reference"):
        y = functional.scaled_dot_product_attention(*wide, is_causal=True)
        oracle = torch.autograd.grad(y, wide, tensors[3].double())
    rows = oracle[0][0, 0, 150:].isfinite().all(-1)  # what stands above is masked
    assert not rows.all() or which == 3
    assert not found[0][0, 0, 150:].isfinite().all(-1)[~rows].any()
    if which in (0, 3):
        above, expected = (grads[0][0, 0, :128].float() for grads in (found, without))  # rows of a tile above
        assert (above - expected).abs().max() <= 0.02 * expected.abs().max()
    assert torch.equal(found[0][0, 1], without[0][0, 1])
    assert ran[-1] == ONE_PASS


def assert_overflow_shows() -> None:
    """Gradients of scores that are too large for float16: what no step of a grid can tell is no number either."""
    g = torch.Generator().manual_seed(5)
    query, key, value, upstream = (torch.randn(1, 2, 70, 40, generator=g).half() * by for by in (1, 1, 300, 300))
    upstream[:, 1] /= 300
    found = []
    for passes in ("one_pass", "two_pass"):
        with attention_backward_by(passes):
            found.append(gradients(functional.scaled_dot_product_attention, (query, key, value), upstream)[0])
    one, two = found
    assert two[:, 0].isnan().any() and two[:, 1].isfinite().all()
    same = torch.equal(one.isnan(), two.isnan()) and torch.equal(one.isinf(), two.isinf())
    assert same, "dQ is a number where it is no number"


def test_what_overflows_float16_is_no_number(ran: Ran):
    assert_overflow_shows()
    assert ran.remade == 1 and ONE_PASS in ran


@pytest.mark.parametrize("dim", [32, 104])
def test_neighbours_that_are_not_numbers_change_nothing_in_a_packed_sequence(dim: int, ran: Ran):
    """Boxes bring the next sequence's keys, rows and gradients along; tokens that belong to none get zeros."""
    lengths = [5, 0, 130, 33]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    spans = list(itertools.pairwise(ends.tolist()))
    g = torch.Generator().manual_seed(3)
    clean = [torch.randn(sum(lengths) + 140, 2, dim, generator=g).half() for _ in range(4)]
    for strange, odd in ((torch.nan, 0), (torch.inf, 1)):  # every other sequence, and the tokens behind the last
        mixed = [t.clone() for t in clean]
        for first, last in [*spans[odd::2], (int(ends[-1]), None)]:
            for t in mixed:
                t[first:last] = strange
        packed = gradients(functional.varlen_attention, mixed[:3], mixed[3], ends, ends, 130, 130, is_causal=True)
        for first, last in spans[1 - odd :: 2]:
            if first == last:
                continue
            q, k, v, upstream = (t[first:last].transpose(0, 1) for t in clean)
            alone = gradients(functional.scaled_dot_product_attention, (q, k, v), upstream, is_causal=True)
            for found, expected in zip(packed, alone, strict=True):
                assert torch.equal(found[first:last], expected.transpose(0, 1))
        assert not any(grad[ends[-1] :].any() for grad in packed)
    assert set(ran) == {"attention_forward_sm90a", ONE_PASS}


def test_keys_that_no_row_sees_and_rows_that_see_no_key_get_zeros(ran: Ran):
    """Whole tiles of them are not looked at: there may be anything."""
    g = torch.Generator().manual_seed(4)
    for rows, keys, causal in ((200, 40, {"causal": "bottom_right"}), (40, 400, {"is_causal": True})):
        query, upstream = (torch.randn(1, 2, rows, 64, generator=g).bfloat16() for _ in range(2))
        key, value = (torch.randn(1, 2, keys, 64, generator=g).bfloat16() for _ in range(2))
        for t in (key, value):
            t[:, :, 128:] = torch.nan
        found = gradients(functional.scaled_dot_product_attention, (query, key, value), upstream, **causal)
        blind = max(0, rows - keys)
        assert not found[0][:, :, :blind].any() and found[0][:, :, blind:].any()
        assert all(grad[:, :, :40].any() and not grad[:, :, 40:].any() for grad in found[1:])
        assert all(grad.isfinite().all() for grad in found)
    assert ran.count(ONE_PASS) == 2


# ---- who takes a call ------------------------------------------------------------------------------------------------


def test_it_runs_where_it_is_asked_for_and_nowhere_else(ran: Ran, monkeypatch):
    g = torch.Generator().manual_seed(6)
    good, wide = (torch.randn(1, 2, 10, dim, generator=g).half() for dim in (16, 136))
    for asked, x, kernel in (
        ("one_pass", good, ONE_PASS),
        ("one_pass", wide, "attention_backward_sm90a"),
        ("two_pass", good, "attention_backward_sm90a"),
        ("", good, "attention_backward_sm90a"),
    ):
        monkeypatch.setenv(ATTENTION_BACKWARD, asked)
        gradients(functional.scaled_dot_product_attention, (x, x, x), x)
        assert ran[-1] == kernel
    monkeypatch.setenv(ATTENTION_BACKWARD, "one_pass")
    for x, said in (
        (good, "in one pass over the scores"),
        (wide, "in two passes: one takes head dims up to 128, got 136"),
    ):
        told = llmengine.explain(lambda: gradients(functional.scaled_dot_product_attention, (x, x, x), x))  # noqa: B023
        assert said in told
    monkeypatch.setenv(ATTENTION, "sm80")
    told = llmengine.explain(lambda: gradients(functional.scaled_dot_product_attention, (good, good, good), good))
    assert "attention_backward: cuda_sim (in two passes: one is for Hopper's kernels)" in told
    monkeypatch.setenv(ATTENTION, "sm90a")
    monkeypatch.setenv(ATTENTION_BACKWARD, "three")
    with pytest.raises(ValueError, match="LLMENGINE_CUDA_ATTENTION_BACKWARD: 'three' is not one of two_pass, one_pass"):
        gradients(functional.scaled_dot_product_attention, (good, good, good), good)


# ---- one line broken -------------------------------------------------------------------------------------------------

PASS, GRID = "attention_sm90a_one_pass", "attention_sm90a_grid"
LATE = "with no mbarrier_wait between|reads shared memory that no thread|what a product of|deadlock"
# kernel, line, what it becomes, what must be said: a wrong result, or what the simulator found
BREAKS: dict[str, tuple[str, str, str, str]] = {
    "no wait for rows": (PASS, "    ptx::mbarrier_wait(&room.full[turn.stage()][0], turn.parity());\n", "", LATE),
    "no wait for gradients": (PASS, "    ptx::mbarrier_wait(&room.full[stage][1], turn.parity());\n", "", LATE),
    "G not shown to the unit": (
        PASS, "    ptx::fence_async_shared();\n    ptx::barrier_arrive(", "    ptx::barrier_arrive(",
        "no fence_async",
    ),
    "the other half of G is not waited for": (
        PASS, "    ptx::barrier_arrive(grads_barrier(turn.number, group ^ 1), 256);\n", "", "deadlock|no thread",
    ),
    "nor the own": (
        PASS, "    ptx::barrier_sync(grads_barrier(turn.number, group), 256);  // G^T of all keys\n",
        "    ptx::barrier_sync(1 + group, 128);\n", "deadlock|with no barrier|no barrier",
    ),
    "one room for G": (PASS, "room.grads[turn.number % 2]", "room.grads[0]", "what a product of|races|with no"),
    "parts written over parts": (
        PASS, "  if (thread == 0) ptx::wait_store_reads<0>();\n", "", "with no (wait_store|commit|wait)|its copy|reads",
    ),
    "no barrier before parts": (
        PASS, "  ptx::barrier_sync(1 + group, 128);  // the part before it has been read\n", "", "with no|races",
    ),
    "no barrier behind parts": (
        PASS, "  ptx::barrier_sync(1 + group, 128);  // the whole part is there\n", "", "with no|races|no thread",
    ),
    "parts not shown to the unit": (
        PASS, "  ptx::fence_async_shared();\n  ptx::barrier_sync(1", "  ptx::barrier_sync(1", "no fence_async",
    ),
    "keys overwritten while the other group multiplies": (
        PASS, "  ptx::barrier_sync(7, 256); ", "  ptx::barrier_sync(1 + group, 128); ", "what a product of|with no",
    ),
    "dQ read while under way": (
        PASS, "    ptx::wgmma_wait<0>(flat(part));\n", "", "accumulators of a product",
    ),
    "stage given back while multiplied": (
        PASS, "    ptx::wgmma_wait<1>(flat(grad_value));\n", "", "what a product of|accumulators of a product",
    ),
    "neighbours' keys stay": (PASS, "if (from < kGroupRows) clear_rows", "if (false) clear_rows", "tiles anew"),
    "neighbours' rows stay": (PASS, "[&] { clear_rows<S::panels, S::passing>", "[&] { (void)", "NaN|exceeds"),
    "cleared rows not shown to the unit": (
        PASS, "  clear();\n  ptx::fence_async_shared();", "  clear();", "with no fence_async between|races",
    ),
    "steps of another tile": (
        PASS, "room.steps[number % room.kept] +", "room.steps[(number + 1) % room.kept] +", "exceeds|no thread|with no",
    ),
    "steps in stages": (PASS, "kept = 2 * S::stages;", "kept = S::stages;", "its copy writes|with no|races"),
    "the first tile alone": (PASS, "if (row == start(w)) ++head;", "++head;", "exceeds|deadlock|no thread"),
    "what is no number passes as 0": (
        PASS, "if (!(strange == 0.0f)) atomicExch", "if (false) atomicExch", "no number",
    ),
    "coarse steps stay": (GRID, "is_too_coarse(largest_of", "is_too_coarse(1e30f + largest_of", "exceeds"),
    "a bound of keys alone": (GRID, "sqrtf(p.grad_squares[at]) *", "0.0f *", "exceeds"),
    "another row's steps": (GRID, "2 * passing + row + i]", "2 * passing + row]", "exceeds"),
    "one key of a mask for two": (PASS, "m.each[at + 8 * half] = x;", "m.each[at] = x;", "exceeds"),
    "another row's steps of a mask": (PASS, "llrintf(x * m.steps(line))", "llrintf(x * m.steps(0))", "exceeds"),
    "another head's keys": (GRID, "+ head / p.sizes.group);", "+ 0);", "one head alone"),
}  # fmt: skip


def unseen_outlier(name: str, **options) -> Sample:
    """A key that is opposed to all queries, and 10^4 times as long as others."""
    sample = sample_of(name, 70, 140, 40, 2, 2, **options)
    sample.args[0][..., 0] = sample.args[0][..., 0].abs() + 1.0
    sample.args[1][0, 0, 5] = 0.0
    sample.args[1][0, 0, 5, 0] = -3e4
    return sample


def try_one_pass(ran: Ran) -> None:
    try_attention()
    assert ran.remade == 0, "neighbours make tiles anew"  # those of packed sequences, which came last
    assert_gradients_right(unseen_outlier("beyond the grid's reach"), torch.float16)
    assert_gradients_right(unseen_outlier("coarse steps", scale=1e-3), torch.float16)
    assert ran.remade == 1, "tiles of one head alone have such a key"
    sample = sample_of("a head of large values", 70, 140, 40, 2, 2)
    sample.args[2][:, 1] *= 1e3
    assert_gradients_right(sample, torch.float16)
    assert_overflow_shows()
    for shape in ((2, 2, 40, 140), (40, 140)):
        assert_gradients_right(masked(40, shape), torch.float16)


def test_whole_kernels_pass_what_broken_ones_must_fail(ran: Ran):
    try_one_pass(ran)


@pytest.mark.parametrize("name", [pytest.param(n, marks=HEAVY if i % 8 else ()) for i, n in enumerate(BREAKS)])
def test_a_broken_line_is_caught(name: str, ran: Ran, tmp_path: Path, monkeypatch):
    kernel, line, becomes, said = BREAKS[name]
    module = broken(kernel, (line, becomes), ("visit_hopper<64, 96, 128>", "visit_hopper<64>"), tmp_path)
    monkeypatch.setattr(cuda_sim.NATIVE, "module", loaded(module, tmp_path.name))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        try_one_pass(ran)
