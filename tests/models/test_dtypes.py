"""Models whose parts have dtypes of their own: how exact they are, their gradients and files, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig

VOCABULARY, LENGTH = 61, 24
SHAPE = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "d_ff": 48, "family": "custom"}
BF16, FP32 = torch.bfloat16, torch.float32
POLICY = {"default": BF16, "norm": FP32, "head": FP32}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert-base", {"max_positions": LENGTH}),
    "gpt2": ("gpt2", {"max_positions": LENGTH}),
    "llama": ("smollm2-135m", {"n_kv_heads": 2}),
    "t5": ("t5-base", {"d_head": 8, "head_scale": 1.0, "position_buckets": 8}),
    "bart": ("bart-base", {"max_positions": LENGTH}),
    "xlnet": ("xlnet-base", {}),
}
every_family = pytest.mark.parametrize("family", PRESETS)


def tiny(family: str, **fields: Any) -> Transformer:
    torch.manual_seed(0)
    preset, own = PRESETS[family]
    rates = dict.fromkeys(("dropout", "embed_dropout", "attention_dropout"), 0.0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family in ("t5", "bart"):
        tokens["decoder_start_token_id"] = 0
    model = Transformer(TransformerConfig.preset(preset, **SHAPE | tokens | rates | own | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(model: Transformer, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(11) < torch.tensor([[11], [6], [8]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if "nsp" in model.config.objectives:
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1])
    return inputs


def rounded_to(model: Transformer, like: Transformer) -> Transformer:
    """float32, with the rounded weights of another."""
    state = {name: tensor.float() for name, tensor in like.state_dict().items()}
    model.load_state_dict(state)
    return model


@every_family
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_is_as_exact_as_all_in_bf16(family, autocast):
    """Of equal rounded weights the mixed model errs at most a little more than the model wholly in bf16 does."""
    mixed = tiny(family).to_dtype(POLICY)
    plain = rounded_to(tiny(family), mixed).to_dtype(BF16)
    # norms and heads that bf16 cannot hold are no error of arithmetic
    exact, mixed_exact = rounded_to(tiny(family), plain), rounded_to(tiny(family), mixed)
    results = []
    for model in (mixed, plain, mixed_exact, exact):
        parts = []
        for seed in range(4):  # a batch's largest errors scatter by a factor of four
            model.zero_grad()
            with torch.autocast("cpu", BF16, enabled=autocast and model in (mixed, plain)):
                out = model(**batch(model, seed), return_logits=True)
            out.loss.backward()
            gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
            parts.append((out.logits.float(), out.loss.float(), gradients))
        results.append([torch.stack(part) for part in zip(*parts, strict=True)])
    for ours, theirs, ours_exact, theirs_exact in zip(*results, strict=True):
        error, allowed = (ours - ours_exact).abs(), (theirs - theirs_exact).abs()
        floor = 1e-3 * theirs_exact.abs().max().clamp_min(1)  # half of what one rounding to bf16 may move
        largest, most = (e.reshape(len(e), -1).amax(1).median() for e in (error, allowed))
        assert largest <= 2 * most + floor and error.norm() <= 1.5 * allowed.norm() + floor
        assert (ours_exact - ours).abs().max() > 0 and ours.isfinite().all()


@every_family
def test_each_parameter_keeps_its_dtype(family, tmp_path):
    model = tiny(family).to_dtype(POLICY).train()
    wide = {n for n, p in model.named_parameters() if p.dtype == FP32}
    norms = {n for n in dict(model.named_parameters()) if "norm" in n}
    assert norms and norms <= wide
    assert {n.split(".")[0] for n in wide - norms} <= {"token_head", "heads", "pooler"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch(model)).loss
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert loss.dtype == FP32 and losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    states = again.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(states[0][n].dtype == t.dtype and torch.equal(states[0][n], t) for n, t in states[1].items())
    third = Transformer.from_pretrained(tmp_path, dtype={"default": BF16, "norm": FP32})
    assert third.words.weight.dtype == BF16 and next(third.stack.layers[0].attention_norm.parameters()).dtype == FP32


@every_family
@pytest.mark.parametrize(
    "policy",
    [
        {"default": BF16, "embeddings": FP32, "layers.0-1": FP32},
        {"embeddings": BF16, "layers.1": torch.float16},
        {"layers": BF16, "layers.2": FP32, "head": BF16},
    ],
    ids=["the first parts", "one layer and the embeddings", "the last layer"],
)
def test_every_door_opens(family, policy):
    """Hidden states change dtype between any two parts, in both directions, and gradients go back through all."""
    mixed = tiny(family).to_dtype(policy)
    exact = rounded_to(tiny(family), mixed)
    for enabled in (False, True):
        mixed.zero_grad()
        with torch.autocast("cpu", BF16, enabled=enabled):
            out = mixed(**batch(mixed), return_logits=True, output_hidden_states=True)
            out.loss.backward()
        gradients = {n: (p.grad, p.dtype) for n, p in mixed.named_parameters() if p.grad is not None}
        assert all(gradient.dtype == dtype for gradient, dtype in gradients.values())
        assert sum(name.endswith("feed_forward.up.weight") for name in gradients) == sum(
            name.endswith("feed_forward.up.weight") for name, _ in mixed.named_parameters()
        )
        torch.testing.assert_close(out.logits.float(), exact(**batch(exact)).logits, rtol=0.1, atol=0.15)
    if mixed.decoder is not None or family == "xlnet":
        ids = mixed.generate(batch(mixed)["input_ids"], max_new_tokens=3)
        assert ids.shape[1] > 1


@pytest.mark.parametrize("objective", ["classification", "tagging", "qa", "choice"])
def test_heads_of_tasks(objective):
    model = tiny("bert", objectives=[objective]).to_dtype({"default": BF16, "head": FP32})
    inputs = {name: tensor for name, tensor in batch(model).items() if name != "labels"}
    if objective == "choice":
        inputs = {name: x[None] for name, x in inputs.items()}
    out = model(**inputs)
    logits = out.start_logits if objective == "qa" else out.logits
    exact = rounded_to(tiny("bert", objectives=[objective]), model)(**inputs)
    expected = exact.start_logits if objective == "qa" else exact.logits
    assert logits.dtype == FP32 and model.pooler.dense.weight.dtype == FP32
    real = expected > torch.finfo(BF16).min
    torch.testing.assert_close(logits[real], expected[real], rtol=0.1, atol=0.1)


def test_a_tied_head_computes_in_its_own_dtype():
    model = tiny("gpt2").to_dtype(POLICY)
    assert model.words.weight.dtype == BF16 and not list(model.token_head.parameters())
    assert model(**batch(model), return_logits=True).logits.dtype == FP32
    assert model.to_dtype(BF16)(**batch(model), return_logits=True).logits.dtype == BF16


def test_a_new_model_in_several_dtypes():
    config = tiny("bart").config
    model = Transformer(config, dtype={"default": FP32, "decoder.layers.1-2": BF16, "encoder.embeddings": BF16})
    found = {n for n, p in model.named_parameters() if p.dtype == BF16}
    parts = {".".join(n.split(".")[: 3 if "layers" in n else 2]) for n in found}
    assert parts == {"decoder.layers.1", "decoder.layers.2", "encoder.embeddings"}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"default": BF16, "norms": FP32}, "no part 'norms'; parts: default, embeddings"),
        ({"layers.7": BF16}, "no part 'layers.7'"),
        ({"decoder.layers.0": BF16}, "no part 'decoder.layers.0'"),
        ({"layers.0.attention": BF16}, "no part 'layers.0.attention'"),
        ({"default": torch.int8}, "'default' is torch.int8; allowed: torch.float32"),
        ({"norm": BF16}, r"norm would be torch.bfloat16 in a part of torch.float32"),
    ],
)
def test_what_is_no_policy_changes_nothing(policy, message):
    model = tiny("bert")
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        model.to_dtype(policy)
    assert {p.dtype for p in model.parameters()} == {FP32}
