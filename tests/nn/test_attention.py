"""MultiheadAttention against torch.nn's: every mask, option and layout, outputs and all gradients."""

from __future__ import annotations

import pytest
import torch

from llmengine import backend, explain, nn
from llmengine.optim import MainGradients
from llmengine.testing import assert_near

from .peers import additive, compare, forbidden, pair, randn, random_mask

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 6, 8, 2
CONSTRUCTORS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 4, "vdim": 6},
    {"kdim": WIDTH, "vdim": 6, "add_bias_kv": True},
]


def inputs(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """query, key, value in the module's layout."""
    shapes = ((QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim))
    tensors = [randn(BATCH, *shape, seed=i) for i, shape in enumerate(shapes)]
    return tuple(t if module.batch_first else t.transpose(0, 1).contiguous() for t in tensors)


def masks(kind: str) -> dict[str, torch.Tensor]:
    padding = forbidden([6, 2, 4], KEYS)
    shared, per_head = random_mask(QUERIES, KEYS), random_mask(BATCH * HEADS, QUERIES, KEYS)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": additive(padding)},
        "shared": {"attn_mask": shared},
        "per head": {"attn_mask": per_head},
        "float": {"attn_mask": additive(shared)},
        "float per head": {"attn_mask": additive(per_head)},
        "both": {"attn_mask": shared, "key_padding_mask": padding},
        "both float": {"attn_mask": additive(per_head), "key_padding_mask": additive(padding)},
    }[kind]


KINDS = ["none", "padding", "float padding", "shared", "per head", "float", "float per head", "both", "both float"]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, batch_first, need_weights):
    ours, theirs = pair("MultiheadAttention", WIDTH, HEADS, batch_first=batch_first)
    compare(ours, theirs, *inputs(ours), need_weights=need_weights, **masks(kind))


def test_projections_are_those_of_functional_linear(monkeypatch):
    """So that a backend multiplies where it is demanded, and a weight's gradient may be added to its buffer."""
    ours, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), randn(BATCH, QUERIES, WIDTH).float()
    with backend("cpu"):
        assert explain(ours, x, x, x, need_weights=False).startswith("linear_forward: cpu")
        mains = MainGradients(ours.parameters())
        ours(x, x, x, need_weights=False)[0].square().sum().backward()
    buffers = mains.gradients()
    mains.remove()
    ours(x, x, x, need_weights=False)[0].square().sum().backward()
    for parameter, main in zip(ours.parameters(), buffers, strict=True):
        assert_near(main, parameter.grad, 1e-5)


@pytest.mark.parametrize("kind", ["none", "both", "both float"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_constructor_options(options, need_weights, kind):
    ours, theirs = pair("MultiheadAttention", WIDTH, HEADS, batch_first=True, **options)
    compare(ours, theirs, *inputs(ours), need_weights=need_weights, **masks(kind))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_weights_averaged_or_not(average, batched):
    ours, theirs = pair("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    args = inputs(ours) if batched else tuple(t[0] for t in inputs(ours))
    compare(ours, theirs, *args, need_weights=True, average_attn_weights=average)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_unbatched(per_head, need_weights):
    ours, theirs = pair("MultiheadAttention", WIDTH, HEADS)
    args = (randn(QUERIES, WIDTH), randn(KEYS, WIDTH, seed=1), randn(KEYS, WIDTH, seed=2))
    mask = random_mask(HEADS, QUERIES, KEYS) if per_head else random_mask(QUERIES, KEYS)
    padding = forbidden([4], KEYS)[0]
    compare(ours, theirs, *args, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_causal_self_attention(batch_first, need_weights, padded):
    ours, theirs = pair("MultiheadAttention", WIDTH, HEADS, batch_first=batch_first)
    x = randn(BATCH, KEYS, WIDTH) if batch_first else randn(KEYS, BATCH, WIDTH)
    options = {"need_weights": need_weights, "is_causal": True}
    if padded:
        options["key_padding_mask"] = forbidden([6, 2, 4], KEYS)
    mask = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    compare(ours, theirs, x, x, x, attn_mask=mask, **options)
    # torch.nn demands the mask beside the hint; ours does not
    ours.double()
    with_mask, without = (ours(x, x, x, attn_mask=m, **options) for m in (mask, None))
    assert_near(without[0], with_mask[0], 1e-12)


@pytest.mark.parametrize("shared", ["query key value", "key value", "query key"])
def test_shared_inputs(shared):
    """One tensor in several places takes a projection of several at once."""
    ours, theirs = pair("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    x, y = randn(BATCH, QUERIES, WIDTH), randn(BATCH, QUERIES, WIDTH, seed=1)
    args = [x if name in shared.split() else y for name in ("query", "key", "value")]
    compare(ours, theirs, *args, need_weights=False)


def test_a_query_that_may_attend_nothing_gets_the_output_bias():
    ours = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    torch.nn.init.normal_(ours.out_proj.bias)
    x = randn(BATCH, KEYS, WIDTH).requires_grad_()
    padding = forbidden([6, 0, 4], KEYS)
    for need_weights in (False, True):
        output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        assert_near(output[1], ours.out_proj.bias.detach().expand(KEYS, WIDTH), 1e-12)
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert grad.isfinite().all() and (grad[1] == 0).all()
        assert weights is None or (weights[1] == 0).all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_of_that_rate_and_in_training_only(need_weights):
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.25, batch_first=True)
    x = torch.randn(1, 400, WIDTH)

    def kept(weights=None) -> float:
        """How much of value 1 in each key comes out on average, in the unit of the scaled mean 1."""
        torch.nn.init.zeros_(attention.in_proj_weight)
        attention.in_proj_bias.data = torch.cat([torch.zeros(2 * WIDTH), torch.ones(WIDTH)])
        attention.out_proj.weight.data = torch.eye(WIDTH)
        output, weights = attention(x, x, x, need_weights=need_weights)
        if weights is not None and attention.training:
            share = (attention(x, x, x, average_attn_weights=False)[1] == 0).float().mean().item()
            assert abs(share - 0.25) < 0.02
        return output.mean().item(), output.std().item()

    mean, deviation = kept()
    # each output is the mean of 400 keys that are 0 or 4/3: deviation sqrt(0.25 / 0.75 / 400)
    assert abs(mean - 1) < 0.01 and abs(deviation - (1 / 3 / 400) ** 0.5) < 0.01
    attention.eval()
    assert kept() == pytest.approx((1.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_a_demanded_backend_projects_if_it_has_linear_layers(name: str):
    """Triton has none: PyTorch's stand in."""
    attention, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(1, 3, WIDTH)
    expected = attention(x, x, x, need_weights=False)[0]
    with backend(name):
        output, _ = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(output, expected)


def test_out_proj_is_called_as_a_module():
    """torch.nn reads its weight; adapters and hooks on it work here."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    seen = []
    attention.out_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = torch.randn(1, 3, WIDTH)
    attention(x, x, x, need_weights=False)
    assert seen == [(1, 3, WIDTH)]


X, Y = torch.ones(2, 5, 8), torch.ones(2, 6, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0, 0], X, X), {}, "query has 1 dimensions"),
        ((X, X[0], X), {}, "key has 2 dimensions, query 3"),
        ((torch.ones(2, 5, 7), X, X), {}, "query has 7 features; expected 8"),
        ((X, torch.ones(2, 5, 7), X), {}, "key has 7 features; expected 8"),
        ((X, X, torch.ones(2, 5, 7)), {}, "value has 7 features; expected 8"),
        ((X, X, Y), {}, r"key \(2, 5, 8\) and value \(2, 6, 8\) differ"),
        ((torch.ones(3, 5, 8), X, X), {}, "query has a batch of 3, key of 2"),
        ((X, Y, Y), {"attn_mask": torch.ones(5, 5).bool()}, r"attn_mask has shape \(5, 5\); expected \(5, 6\)"),
        ((X, Y, Y), {"attn_mask": torch.ones(3, 5, 6).bool()}, r"attn_mask has shape \(3, 5, 6\)"),
        ((X, Y, Y), {"attn_mask": torch.ones(5, 6).int()}, "attn_mask has dtype torch.int32; allowed: bool"),
        ((X, Y, Y), {"key_padding_mask": torch.ones(2, 5).bool()}, r"key_padding_mask has shape \(2, 5\)"),
        ((X, Y, Y), {"key_padding_mask": torch.ones(2, 6).long()}, "key_padding_mask has dtype torch.int64"),
    ],
)
def test_bad_inputs_are_named(args, options, message):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match=f"MultiheadAttention: {message}"):
        attention(*args, **options)


def test_nested_tensors_are_refused_with_a_remedy():
    ragged = torch.nested.nested_tensor([X[0], Y[0]], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"query is a nested tensor, .* use llmengine\.functional\.varlen_attention"):
        nn.MultiheadAttention(8, 2, batch_first=True)(ragged, ragged, ragged)
