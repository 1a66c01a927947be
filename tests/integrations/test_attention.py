"""Our attention function and masks under Transformers' contract: what reaches the kernel, and that it is right."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from transformers import AttentionInterface, BertConfig, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from llmengine import functional
from llmengine.integrations.transformers import attention as ours
from llmengine.integrations.transformers import register

from .families import batch, build, run

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = {
    "causal": (masking_utils.create_causal_mask, {}),
    "window": (masking_utils.create_sliding_window_causal_mask, {"sliding_window": 4}),
    "both ways": (masking_utils.create_bidirectional_mask, {}),
    "window both ways": (masking_utils.create_bidirectional_sliding_window_mask, {"sliding_window": 3}),
    "chunks": (masking_utils.create_chunked_causal_mask, {"attention_chunk_size": 4}),
}
CAUSAL_MODULE, PLAIN_MODULE = types.SimpleNamespace(is_causal=True), types.SimpleNamespace(is_causal=False)


@pytest.fixture
def masks_given(monkeypatch):
    """The masks that reach our operator, call by call."""
    given, operator = [], functional.scaled_dot_product_attention

    def spy(query, key, value, mask=None, *args, **kwargs):
        given.append(mask)
        return operator(query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(ours.functional, "scaled_dot_product_attention", spy)
    return given


def operands(rows: int = 9, keys: int = 9, heads: int = 4, key_heads: int = 2):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, heads, rows, 8, generator=g),
        torch.randn(3, key_heads, keys, 8, generator=g),
        torch.randn(3, key_heads, keys, 8, generator=g),
    )


def plain(query, key, value, allowed, bias=0.0, scale=8**-0.5):
    """The formula; a row that sees nothing gives zeros. `allowed` is boolean, or a mask to be added."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * scale + bias
    scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


def made_mask(kind: str, padding: str, length: int = 9):
    register()
    create, fields = KINDS[kind]
    config = BertConfig(**fields)
    config._attn_implementation = "llmengine"
    real = torch.arange(length) < torch.tensor([length, 5, 2])[:, None]
    real = {"none": None, "right": real.long(), "left": real.flip(1).long()}[padding]
    given = {"inputs_embeds": torch.empty(3, length, 32), "attention_mask": real}
    given |= {} if "both" in kind else {"cache": None, "position_ids": None}
    mask = create(config, **given)
    config._attn_implementation = "eager"
    eager = create(config, **given)
    allowed = torch.ones(3, 1, length, length, dtype=torch.bool) if eager is None else eager == 0
    return mask, allowed


def test_registers_attention_with_its_masks():
    register()
    before = (len(AttentionInterface()), len(AttentionMaskInterface()))
    register()
    assert (len(AttentionInterface()), len(AttentionMaskInterface())) == before
    assert AttentionInterface()["llmengine"] is ours.attention
    assert AttentionMaskInterface()["llmengine"] is ours.attention_mask


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, padding, masks_given):
    """The dense mask is Transformers'; a band reaches the kernel as numbers and, where there is padding, its keys."""
    mask, allowed = made_mask(kind, padding)
    module = PLAIN_MODULE if "both" in kind else CAUSAL_MODULE
    if mask is not None:
        assert torch.equal(mask.expand_as(allowed), allowed)
    output, weights = ours.attention(module, *operands(), mask, scaling=8**-0.5)
    assert weights is None and output.is_contiguous()
    torch.testing.assert_close(output, plain(*operands(), allowed), **CLOSE)
    (given,) = masks_given
    if kind == "chunks":
        assert given.shape == (3, 1, 9, 9)
    elif padding == "none":
        assert given is None
    else:
        assert given.shape == (3, 1, 1, 9)


def test_a_mask_that_was_written_into_counts_as_it_is(masks_given):
    mask, allowed = made_mask("causal", "right")
    mask[:, :, :, 0] = False
    allowed = allowed & mask
    output, _ = ours.attention(CAUSAL_MODULE, *operands(), mask)
    torch.testing.assert_close(output, plain(*operands(), allowed), **CLOSE)
    assert masks_given == [mask]


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_a_chunk_after_a_cache(kind):
    """Queries that begin at the fifth key: the mask is a band that is aligned at the last key."""
    pattern = masking_utils.causal_mask_function
    pattern = pattern if kind == "causal" else masking_utils.sliding_window_causal_mask_function(4)
    real = torch.arange(9) >= torch.tensor([0, 1, 2])[:, None]
    mask = ours.attention_mask(3, 4, 9, 5, 0, pattern, real)
    i, j = torch.arange(5, 9)[:, None], torch.arange(9)
    allowed = (j <= i) & ((j > i - 4) | (kind == "causal")) & real[:, None, None, :]
    assert torch.equal(mask, allowed) and mask.llmengine_band.causal == "bottom_right"
    output, _ = ours.attention(CAUSAL_MODULE, *operands(rows=4), mask)
    torch.testing.assert_close(output, plain(*operands(rows=4), allowed), **CLOSE)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_in_inference_mode(padding, masks_given):
    """Masks made there are bands as elsewhere, and still count what is written into them."""
    with torch.inference_mode():
        mask, allowed = made_mask("causal", padding)
        output, _ = ours.attention(CAUSAL_MODULE, *operands(), mask, scaling=8**-0.5)
        torch.testing.assert_close(output, plain(*operands(), allowed), **CLOSE)
        mask[:, :, :, 0] = False
        ours.attention(CAUSAL_MODULE, *operands(), mask, scaling=8**-0.5)
    assert masks_given[0].shape == (3, 1, 1, 9) and masks_given[1] is mask


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_in_inference_mode(family):
    model = build(family)
    model.set_attn_implementation("llmengine")
    given = batch(family, "left")
    expected = model(**given)
    with torch.inference_mode():
        found = model(**given)
    torch.testing.assert_close([found.loss, found.logits], [expected.loss, expected.logits])


def test_without_a_mask():
    """`is_causal` goes before the module's own; a single query sees all keys, or its window's."""
    causal, everything = torch.ones(9, 9, dtype=torch.bool).tril(), torch.ones(9, 9, dtype=torch.bool)
    for module, argument, allowed in (
        (CAUSAL_MODULE, None, causal), (CAUSAL_MODULE, False, everything), (PLAIN_MODULE, None, everything),
        (PLAIN_MODULE, True, causal), (types.SimpleNamespace(), None, causal),
    ):  # fmt: skip
        output, _ = ours.attention(module, *operands(), None, is_causal=argument)
        torch.testing.assert_close(output, plain(*operands(), allowed), **CLOSE)

    one = operands(rows=1)
    window = everything & (torch.arange(9) > 9 - 1 - 4)
    torch.testing.assert_close(ours.attention(CAUSAL_MODULE, *one, None)[0], plain(*one, everything[:1]), **CLOSE)
    got = ours.attention(CAUSAL_MODULE, *one, None, sliding_window=4)[0]
    torch.testing.assert_close(got, plain(*one, window[:1]), **CLOSE)
    band = causal & (torch.arange(9) > torch.arange(9)[:, None] - 4)
    got = ours.attention(CAUSAL_MODULE, *operands(), None, sliding_window=4)[0]
    torch.testing.assert_close(got, plain(*operands(), band), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masks_that_are_added(dtype):
    """A user's own 4-D mask: added, in whatever float dtype it comes; it says causality too."""
    added = torch.zeros(3, 1, 9, 9).masked_fill(torch.rand(3, 1, 9, 9) < 0.3, torch.finfo(torch.float32).min)
    output, _ = ours.attention(CAUSAL_MODULE, *operands(), added.to(dtype))
    torch.testing.assert_close(output, plain(*operands(), added.to(dtype).float()), **CLOSE)


@pytest.mark.parametrize("padding", ["none", "right", "left", "added"])
def test_position_bias(padding):
    """T5's bias gets its gradient under every mask; T5 does not scale its scores."""
    bias, other = (torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "12")
    mask, allowed = made_mask("causal", "right" if padding == "added" else padding)
    if padding == "added":
        mask = torch.zeros(3, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    output, _ = ours.attention(CAUSAL_MODULE, *operands(), mask, scaling=1.0, position_bias=bias)
    expected = plain(*operands(), allowed, other, 1.0)
    torch.testing.assert_close(output, expected, **CLOSE)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    some = allowed.any(-1)[:, 0, :, None, None]  # a row that sees nothing has no gradient, and NaN in the formula
    (output * direction * some).sum().backward()
    torch.where(some, expected * direction, 0.0).sum().backward()
    torch.testing.assert_close(bias.grad, other.grad.nan_to_num(0.0), rtol=1e-4, atol=1e-4)


def test_softcap_and_dropout():
    cap = torch.ones(9, 9, dtype=torch.bool).tril()
    q, k, v = operands()
    got, _ = ours.attention(CAUSAL_MODULE, q, k, v, None, softcap=0.5)
    scores = 0.5 * torch.tanh(q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 8**-0.5 / 0.5)
    expected = scores.masked_fill(~cap, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected.transpose(1, 2), **CLOSE)

    torch.manual_seed(0)
    once = ours.attention(CAUSAL_MODULE, q, k, v, None, dropout=0.5)[0]
    again = ours.attention(CAUSAL_MODULE, q, k, v, None, dropout=0.5)[0]
    torch.manual_seed(0)
    assert not torch.equal(once, again)
    assert torch.equal(ours.attention(CAUSAL_MODULE, q, k, v, None, dropout=0.5)[0], once)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_sinks(padding):
    """A key without a value takes its share of each row, and its score has a gradient."""
    mask, allowed = made_mask("window", padding)
    mine, other = (torch.tensor([-1.0, 0.0, 1.0, 2.0], requires_grad=True) for _ in "12")
    q, k, v = operands()
    got, _ = ours.attention(CAUSAL_MODULE, q, k, v, mask, s_aux=mine, sliding_window=4)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 8**-0.5).masked_fill(~allowed, -torch.inf)
    scores = torch.cat([scores, other.view(1, 4, 1, 1).expand(3, 4, 9, 1)], -1)
    expected = (scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(got, expected, **CLOSE)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["bert", "gpt_neox", "mistral", "gemma2", "modernbert", "t5", "bart"])
def test_attention_weights(family, padding):
    """Where they are asked for; Transformers gives them on eager attention alone."""
    model, inputs = build(family).eval(), batch(family, padding)
    rows = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected = model(**inputs, output_attentions=True)
    model.set_attn_implementation("llmengine")
    got = model(**inputs, output_attentions=True)
    for field in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for mine, theirs in zip(got.get(field, ()) or (), expected.get(field, ()) or (), strict=True):
            some = rows if field in ("attentions", "encoder_attentions") else slice(None)
            mine, theirs = mine.transpose(1, 2)[some], theirs.transpose(1, 2)[some]
            torch.testing.assert_close(mine, theirs, **CLOSE)
    assert any(got.get(field) for field in ("attentions", "cross_attentions"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "mistral", "gemma3", "modernbert", "bart", "t5"])
def test_no_model_holds_a_dense_mask(family, masks_given):
    """Padded or not, causal or not, in a window or not. T5 alone joins its bias to the padding."""
    model = build(family)
    model.set_attn_implementation("llmengine")
    for padding in ("none", "right"):
        masks_given.clear()
        run(model, batch(family, padding))
        assert masks_given
        for mask in masks_given:
            if family == "t5":
                assert mask.dtype == torch.float32
            else:
                assert mask is None if padding == "none" else mask is None or mask.shape[2] == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_rows_stay_apart(family):
    """Positions that begin anew are Transformers' sign of packed texts: the first text does not see the second."""
    model = build(family)
    model.set_attn_implementation("llmengine")
    inputs = batch(family, rows=1, length=12)
    inputs |= {"position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None], "use_cache": False}
    expected = model(**inputs).logits
    changed = copy.deepcopy(inputs)
    changed["input_ids"][0, :7] = 3
    torch.testing.assert_close(model(**changed).logits[:, 7:], expected[:, 7:], rtol=0, atol=1e-6)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
