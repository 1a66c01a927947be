"""PyTorch's own samples for its modules (ModuleInfo), run through ours: outputs and all gradients as torch.nn's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.testing._internal.common_modules import FunctionInput, ModuleInput, module_db

from llmengine import nn
from llmengine.testing import assert_near

from .peers import evaluate

INFOS = {info.name.removeprefix("nn."): info for info in module_db if info.name.removeprefix("nn.") in nn.__all__}
NAMES = [name for name in nn.__all__ if name in INFOS]
NO_LABELS = "a mean over no labels"  # 0 with zero gradients by design, where torch.nn gives NaN
# What ours refuses, by words of its sentence
REFUSED = {
    "CrossEntropyLoss": ("class probabilities are not supported",),
    "LinearCrossEntropyLoss": ("class probabilities", "out_features"),
}
# What becomes of PyTorch 2.13's samples, in training (the layers have fewer in eval mode)
COUNTS = {
    "CrossEntropyLoss": {"equal": 68, "class probabilities are not supported": 36, NO_LABELS: 1},
    "Embedding": {"equal": 2},
    "LayerNorm": {"equal": 7},
    "LinearCrossEntropyLoss": {"equal": 460, "class probabilities": 24, "out_features": 373},
    "MultiheadAttention": {"equal": 64},
    "RMSNorm": {"equal": 6},
    "Transformer": {"equal": 64},
    "TransformerDecoderLayer": {"equal": 67},
    "TransformerEncoder": {"equal": 39},
    "TransformerEncoderLayer": {"equal": 39},
}
MODES = [
    pytest.param(name, training, id=f"{name}-{'train' if training else 'eval'}")
    for name in NAMES
    for training in ((True, False) if name.startswith("Transformer") or name == "MultiheadAttention" else (True,))
]


def samples(name: str, training: bool) -> list[ModuleInput]:
    torch.manual_seed(0)
    info = INFOS[name]
    return info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)


def build(room, name: str, given: FunctionInput) -> torch.nn.Module:
    """torch.nn's module, or ours where its constructor takes layers of the same room."""
    args = [ours_of(arg) if room is nn and isinstance(arg, torch.nn.Module) else arg for arg in given.args]
    torch.manual_seed(0)
    return getattr(room, name)(*args, **given.kwargs).double()


def ours_of(layer: torch.nn.Module) -> torch.nn.Module:
    """Our twin of a layer of torch.nn: the sample's constructor arguments hold built layers."""
    theirs = layer.self_attn
    twin = nn.TransformerEncoderLayer(
        theirs.embed_dim, theirs.num_heads, layer.linear1.out_features, layer.dropout.p, layer.activation,
        layer.norm1.eps, theirs.batch_first, layer.norm_first, layer.linear1.bias is not None,
    )  # fmt: skip
    twin.load_state_dict(layer.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize(("name", "training"), MODES)
def test_samples(name, training):
    counts: Counter[str] = Counter()
    for i, sample in enumerate(samples(name, training)):
        theirs = build(torch.nn, name, sample.constructor_input).train(training)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        try:
            ours = build(nn, name, sample.constructor_input).train(training)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            got = evaluate(ours, args, kwargs, torch.float64)
        except ValueError as error:
            reason = next((text for text in REFUSED.get(name, ()) if text in str(error)), None)
            assert reason is not None, f"sample {i} {sample.desc}: {error}"
            counts[reason] += 1
            continue
        expected = evaluate(theirs, args, kwargs, torch.float64)
        if expected["output 0"].isnan().all() and name in REFUSED:
            assert not any(tensor.any() for tensor in got.values()), sample.desc
            counts[NO_LABELS] += 1
            continue
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_near(got[key], tensor, 1e-12, f"sample {i} {sample.desc}: {key}")
        counts["equal"] += 1
    assert counts["equal"] > 0
    if torch.__version__.startswith("2.13."):
        assert counts == COUNTS[name] if training else counts.keys() == {"equal"}, counts


def test_what_has_samples_is_compared():
    others = {"FeedForward", "Fp8Linear", "keep_fp8_weights", "TransformerDecoder", "LinearCrossEntropyLoss"}
    assert set(nn.__all__) - set(NAMES) <= others
