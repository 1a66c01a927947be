"""The feed-forward block: random shapes, layouts and options; torch.nn as oracle; blocks of the products; errors."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llmengine
from llmengine import functional
from llmengine.testing import LAYOUTS, Sample, all_operators, assert_law, evaluate, poison
from llmengine.testing.law import GRADIENT, OUTPUT

OPERATOR = next(op for op in all_operators() if op.name == "ffn")
ACTIVATIONS = {
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "relu": torch.nn.ReLU(),
    "relu_squared": lambda x: torch.relu(x).square(),
    "silu": torch.nn.SiLU(),
}


def make(
    tokens: int, d: int, f: int, seed: int, *, gated=False, biases=True, residual=False, **options
) -> Sample:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    if biases:
        options |= {"b_up": randn(f), "b_down": randn(d)}
    if gated:
        options["w_gate"] = randn(f, d, scale=2 * max(d, 1) ** -0.5)
        if biases:
            options["b_gate"] = randn(f)
    args = (randn(tokens, d), randn(f, d, scale=2 * max(d, 1) ** -0.5), randn(d, f, scale=max(f, 1) ** -0.5))
    if residual:
        options["residual"] = randn(tokens, d)
    return Sample(f"{tokens} x {d} x {f}", args, options)


def assert_lawful(sample: Sample, given: Sample) -> None:
    """`given` on the CPU backend against float64 and plain PyTorch on `sample`, the same numbers laid out plainly."""
    oracle = evaluate(OPERATOR.function, sample.rounded(torch.float64), "reference")
    plain = evaluate(OPERATOR.plain, sample, None)
    with poison():
        ours = evaluate(OPERATOR.function, given, "cpu")
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, f"{sample.name}: output")
    for key in oracle[1]:
        assert_law(ours[1][key], plain[1][key], oracle[1][key], GRADIENT, f"{sample.name}: grad {key}")


# Sizes from where the law's root mean square is one: below, plain PyTorch's luck with single roundings decides.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tokens=st.integers(20, 230), d=st.integers(16, 70), f=st.integers(16, 420), seed=st.integers(0, 99),
    activation=st.sampled_from(sorted(ACTIVATIONS)), gated=st.booleans(), biases=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)  # fmt: skip
def test_law_on_random_shapes_layouts_and_options(
    tokens, d, f, seed, activation, gated, biases, dropout_p, dtype, layout
):
    options = {"activation": activation, "dropout_p": dropout_p, "residual": seed % 2 == 1}
    sample = make(tokens, d, f, seed, gated=gated, biases=biases, **options).rounded(dtype)
    assert_lawful(sample, sample.rounded(dtype, LAYOUTS[layout]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 9), d=st.integers(0, 9), f=st.integers(0, 9), seed=st.integers(0, 99),
    activation=st.sampled_from(sorted(ACTIVATIONS)), gated=st.booleans(), biases=st.booleans(),
)  # fmt: skip
@example(tokens=4, d=0, f=8, seed=0, activation="gelu", gated=True, biases=False)  # two accumulators without terms
def test_small_sizes(tokens, d, f, seed, activation, gated, biases):
    residual = seed % 2 == 1
    sample = make(tokens, d, f, seed, gated=gated, biases=biases, activation=activation, residual=residual)
    oracle = evaluate(OPERATOR.function, sample, "reference")
    ours = evaluate(OPERATOR.function, sample.rounded(torch.float32), "cpu")
    for a, b in zip([*ours[0], *ours[1].values()], [*oracle[0], *oracle[1].values()], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    "tokens, d, f",
    [(97, 257, 385), (600, 48, 3100), (40, 5000, 500), (3000, 40, 90)],
    ids=["past every block", "wide", "several strips", "many tokens"],
)
def test_sizes_past_the_blocks_of_the_products(tokens, d, f, gated, dtype):
    sample = make(tokens, d, f, 0, gated=gated, dropout_p=0.1, residual=True).rounded(dtype)
    assert_lawful(sample, sample)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_float32_parameters_beside_bfloat16_input(gated):
    """As right as with bfloat16 parameters of the same values; each gradient has its parameter's dtype."""
    half = make(50, 40, 70, 1, gated=gated).rounded(torch.bfloat16)
    wide = half.rounded(torch.float32)
    mixed = replace(wide, args=(half.args[0], *wide.args[1:]))
    oracle = evaluate(OPERATOR.function, half.rounded(torch.float64), "reference")
    plain, ours = evaluate(OPERATOR.plain, half, None), evaluate(OPERATOR.function, mixed, "cpu")
    assert_law(ours[0][0], plain[0][0], oracle[0][0], OUTPUT, "output")
    assert ours[0][0].dtype == torch.bfloat16
    for key, gradient in ours[1].items():
        assert gradient.dtype == (torch.bfloat16 if key == 0 else torch.float32)
        assert_law(gradient, plain[1][key], oracle[1][key], GRADIENT, f"grad {key}")


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_equals_modules_of_torch_nn(activation):
    torch.manual_seed(0)
    up, down = torch.nn.Linear(48, 130), torch.nn.Linear(130, 48)
    x, grad = torch.randn(2, 33, 48, requires_grad=True), torch.randn(2, 33, 48)
    leaves = [x, up.weight, up.bias, down.weight, down.bias]
    expected = down(ACTIVATIONS[activation](up(x)))
    with llmengine.backend("cpu"):
        ours = functional.ffn(x, up.weight, down.weight, b_up=up.bias, b_down=down.bias, activation=activation)
        gradients = torch.autograd.grad(ours, leaves, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_over_the_whole_line(activation):
    """Through unit weights: far tails, infinity and NaN, value and slope."""
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([1e4, -1e4, 1e30, -1e30, torch.inf, torch.nan])])
    x = x.double()[:, None].requires_grad_()
    one = torch.ones(1, 1).double()
    expected = ACTIVATIONS[activation](x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    given = x.detach().float().requires_grad_()
    with llmengine.backend("cpu"):
        ours = functional.ffn(given, one.float(), one.float(), activation=activation)
        (ours_slope,) = torch.autograd.grad(ours.sum(), given)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
    finite = x.detach().abs() < 1e30  # at infinity autograd's formulas give NaN where ours keep the limit
    torch.testing.assert_close(ours_slope.double()[finite], slope[finite], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients_are_equal_bits_for_any_number_of_threads(gated):
    sample = make(301, 70, 800, 2, gated=gated, dropout_p=0.2).rounded(torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(evaluate(functional.ffn, sample, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0][0][0], other[0][0])
        assert all(torch.equal(found[0][1][key], other[1][key]) for key in found[0][1])


def test_dropout_drops_its_share_of_the_hidden_layer():
    """With unit hidden values and a sum over them, an output counts the units kept."""
    f, p = 4096, 0.3
    x, up, down = torch.ones(50, 1), torch.ones(f, 1), torch.full((1, f), 1 / f)
    torch.manual_seed(0)
    with llmengine.backend("cpu"):
        kept = functional.ffn(x, up, down, activation="relu", dropout_p=p) * (1 - p)
    assert abs(kept.mean().item() - (1 - p)) < 4 * (p * (1 - p) / (50 * f)) ** 0.5
    assert kept.unique().numel() > 10  # rows differ


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w_up": torch.ones(6, 5)}, r"w_up has shape \(6, 5\); expected \(6, 4\)"),
        ({"w_down": torch.ones(4, 7)}, r"w_down has shape \(4, 7\); expected \(4, 6\)"),
        ({"b_up": torch.ones(4)}, r"b_up has shape \(4,\); expected \(6,\)"),
        ({"b_down": torch.ones(1, 4)}, r"b_down has shape \(1, 4\); expected \(4,\)"),
        ({"w_gate": torch.ones(5, 4)}, r"w_gate has shape \(5, 4\); expected \(6, 4\)"),
        ({"b_gate": torch.ones(6)}, "b_gate was given without w_gate"),
        ({"activation": "swish"}, "activation is 'swish'; allowed: 'gelu', 'gelu_tanh', 'relu', 'relu_sq"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"input": torch.ones(())}, r"input has shape \(\); expected \(\*, d\)"),
        ({"input": torch.ones(3, 4, dtype=torch.int64)}, "input has dtype int64; allowed: float32"),
        ({"w_up": torch.ones(6, 4, dtype=torch.bfloat16)}, "w_up has dtype bfloat16; allowed: that of input"),
        ({"w_up": torch.ones(6, 4, device="meta")}, "w_up is on meta but input is on cpu"),
        ({"residual": torch.ones(4)}, r"residual has shape \(4,\); expected input's, \(3, 4\)"),
        ({"residual": torch.ones(3, 4).int()}, "residual has dtype int32; allowed: float32"),
        ({"residual": torch.ones(3, 4, device="meta")}, "residual is on meta but input is on cpu"),
    ],
)
def test_errors_name_argument_given_and_allowed(change, message):
    arguments = {"input": torch.ones(3, 4), "w_up": torch.ones(6, 4), "w_down": torch.ones(4, 6)} | change
    with pytest.raises(ValueError, match=f"^ffn: {message}"):
        functional.ffn(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_a_residual_rounds_once_and_passes_its_gradient_through(backend):
    """Beside it nothing changes: the other gradients have the bits that they have without it."""
    sample = make(40, 24, 70, 3, gated=True).rounded(torch.float32)
    stream = 1e4 * torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    added = replace(sample, kwargs=sample.kwargs | {"residual": stream})
    without, found = (evaluate(functional.ffn, s, backend, torch.ones_like) for s in (sample, added))
    assert torch.equal(found[1].pop("residual"), torch.ones(40, 24))
    assert all(torch.equal(found[1][key], gradient) for key, gradient in without[1].items())
    exact = evaluate(functional.ffn, sample.rounded(torch.float64), "reference")[0][0] + stream.double()
    assert ((found[0][0] - exact).abs() <= 2**-24 * exact.abs() + 1e-4).all()


def test_a_residual_of_another_dtype_is_added_as_pytorch_adds_it():
    """A float32 stream beside a 16-bit block, as autocast has it."""
    sample = make(5, 16, 24, 3).rounded(torch.bfloat16)
    stream = torch.randn(5, 16, requires_grad=True)
    result = functional.ffn(*sample.args, **sample.kwargs, residual=stream)
    assert result.dtype == torch.float32
    assert torch.equal(result, stream + functional.ffn(*sample.args, **sample.kwargs))
    assert torch.equal(torch.autograd.grad(result.sum(), stream)[0], torch.ones(5, 16))


def test_a_residual_under_opcheck_and_in_one_graph():
    """Whose gradient is the output's there, too."""
    p = {name: t.detach() for name, t in block(8, 12, torch.float32, gated=False).items()}
    x, stream = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True)
    args = (x, p["w_up"], p["b_up"], None, None, p["w_down"], p["b_down"], stream.detach(), None, "gelu", 0.0, True)
    torch.library.opcheck(torch.ops.llmengine.ffn_forward.default, args)
    torch._dynamo.reset()
    compiled = torch.compile(functional.ffn, fullgraph=True, backend="aot_eager")
    found, expected = (call(x, **p, residual=stream) for call in (compiled, functional.ffn))
    torch.testing.assert_close(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), stream)[0], torch.ones(5, 8))


# ---- memory or speed -------------------------------------------------------------------------------------------------


def saved_bytes(call) -> tuple[torch.Tensor, int]:
    """What a call gives, and how much it keeps for the backward beside its parameters, each tensor counted once."""
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return call(), sum(kept.values())


def block(d: int, f: int, dtype: torch.dtype, gated: bool):
    """Parameters as functional.ffn names them."""
    g = torch.Generator().manual_seed(d + f)
    names = {"w_up": (f, d), "w_down": (d, f), "b_up": (f,), "b_down": (d,)}
    names |= {"w_gate": (f, d), "b_gate": (f,)} if gated else {}
    return {name: torch.nn.Parameter(torch.randn(s, generator=g).to(dtype) / 4) for name, s in names.items()}


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_recomputed_pre_activations_change_no_bit_and_are_not_kept(gated, backend):
    tokens, d, f = 130, 24, 70
    for dtype in (torch.float32, torch.float16 if backend == "triton" else torch.bfloat16):
        p = block(d, f, dtype, gated)
        x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        found = []
        for recompute in (False, True):
            torch.manual_seed(3)
            options = {"activation": "silu", "dropout_p": 0.2, "recompute": recompute}
            with llmengine.backend(backend), poison():
                output, kept = saved_bytes(lambda options=options, x=x, p=p: functional.ffn(x, **p, **options))
                gradients = torch.autograd.grad(output.sum(), [x, *p.values()])
            assert kept == dtype.itemsize * tokens * (d + (0 if recompute else (1 + gated) * f)) + 8  # and the seed
            found.append([output, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), dtype


@pytest.mark.parametrize("compiler", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_graphs_do_not_keep_what_is_to_be_recomputed(compiler):
    """Neither of the two ways in which a graph of forward and backward together is cut in two."""
    p = block(24, 70, torch.float32, gated=True)
    x = torch.randn(50, 24, requires_grad=True)
    kept = {}
    for recompute in (False, True):
        torch._dynamo.reset()
        block_of = functools.partial(functional.ffn, **p, recompute=recompute)
        call = torch.compile(block_of, fullgraph=True, backend=compiler)
        output, kept[recompute] = saved_bytes(lambda call=call: call(x))
        output.sum().backward()
    assert kept == {True: 4 * 50 * 24, False: 4 * 50 * (24 + 2 * 70)}


def test_opcheck_of_a_backward_that_recomputes_into_buffers():
    """With buffers for some of the weights, which are changed, and the others' gradients returned."""
    p = {name: t.detach() for name, t in block(8, 12, torch.float32, gated=True).items()}
    given = (p["w_up"], p["b_up"], p["w_gate"], p["b_gate"], p["w_down"])
    mains = (torch.ones(12, 8), None, torch.ones(8, 12))
    args = (torch.randn(5, 8), torch.randn(5, 8), *given, None, None, None, "gelu", 0.0, *mains, [True] * 7)
    torch.library.opcheck(torch.ops.llmengine.ffn_backward.default, args)
