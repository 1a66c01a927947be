"""Every family on our attention, and accelerated whole: loss, logits and every gradient as with Transformers' eager."""

from __future__ import annotations

import pytest
import torch

from llmengine.integrations.transformers import accelerate, explain, register, restore

from .families import CAUSAL, ENCODER_DECODERS, FAMILIES, batch, build, run

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXPERTS = {"GptOssMLP", "GptOssExperts"}  # a choice among feed-forward blocks, which we have not
every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_padding = pytest.mark.parametrize("padding", ["none", "right", "left"])


def assert_same(got, expected):
    """Within 1e-5 of the largest entry of each tensor (of 1 where that is smaller)."""
    (loss, logits, gradients), (their_loss, their_logits, theirs) = got, expected
    pairs = {"loss": (loss, their_loss), "logits": (logits, their_logits)}
    for name, (mine, other) in (pairs | {n: (gradients[n], g) for n, g in theirs.items()}).items():
        error, scale = (mine - other).abs().max().item(), max(1.0, other.abs().max().item())
        assert error <= 1e-5 * scale, f"{name}: {error:.2g} beside {scale:.2g}"


@every_padding
@every_family
def test_attention_alone(family, padding):
    model, inputs = build(family), batch(family, padding)
    expected = run(model, inputs)
    register()
    model.set_attn_implementation("llmengine")
    assert_same(run(model, inputs), expected)


@every_padding
@every_family
def test_accelerated(family, padding):
    model, inputs = build(family), batch(family, padding)
    expected, before = run(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    assert accelerate(model) is model
    assert_same(run(model, inputs), expected)

    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    report = explain(model)
    left = [line.split(", ")[1] for line in report.splitlines() if line.startswith("left, ")]
    assert not set(left) - EXPERTS, report
    for what in {"attention", "loss of the LM head", *FAMILIES[family][3]}:
        assert any(line.startswith(what) for line in report.splitlines()), f"{what}:\n{report}"

    classes = {name: type(module) for name, module in build(family).named_modules()}
    assert {name: type(module) for name, module in restore(model).named_modules()} == classes
    assert model.config._attn_implementation == "eager" and "llmengine" not in " ".join(model.__dict__)
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODER_DECODERS])
def test_generates_with_its_cache(family):
    """Greedy tokens and their scores, prompts padded on the left where the model is a decoder."""
    model, inputs = build(family).eval(), batch(family, "left" if family in CAUSAL else "right")
    del inputs["labels"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_scores": True}
    expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    got = accelerate(model).generate(**inputs, **options, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gemma2", "modernbert"])
def test_in_evaluation_mode(family):
    model, inputs = build(family).eval(), batch(family, "right")
    with torch.no_grad():
        expected = model(**inputs)
        got = accelerate(model)(**inputs)
    torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    labelled = inputs["labels"] != -100
    torch.testing.assert_close(got.logits[labelled], expected.logits[labelled], **CLOSE)
