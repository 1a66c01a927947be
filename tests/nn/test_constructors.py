"""Every module has torch.nn's constructor, arguments, state_dict and initial weights, and names bad arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

from llmengine import nn

from .peers import pair

SIZES = {
    "Embedding": ((10, 8), {"padding_idx": 3}),
    "LayerNorm": ((8,), {}),
    "RMSNorm": ((8,), {}),
    "MultiheadAttention": ((8, 2), {"add_bias_kv": True}),
    "CrossEntropyLoss": ((torch.ones(5),), {}),
    "LinearCrossEntropyLoss": ((8, 5), {"bias": True, "weight": torch.ones(5)}),
    "TransformerEncoderLayer": ((8, 2, 16), {}),
    "TransformerDecoderLayer": ((8, 2, 16), {}),
    "TransformerEncoder": ((torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), {}),
    "TransformerDecoder": ((torch.nn.TransformerDecoderLayer(8, 2, 16), 2), {}),
    "Transformer": ((8, 2, 2, 2, 16), {}),
}
PEERS = [name for name in SIZES if hasattr(torch.nn, name)]  # PyTorch has LinearCrossEntropyLoss since 2.12


def arguments(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_every_public_module_is_compared():
    assert set(SIZES) | {"FeedForward", "Fp8Linear", "keep_fp8_weights"} == set(nn.__all__)
    assert set(SIZES) - set(PEERS) <= {"LinearCrossEntropyLoss"}


@pytest.mark.parametrize("name", PEERS)
def test_same_signatures(name):
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert arguments(ours) == arguments(theirs)
    assert arguments(ours.forward) == arguments(theirs.forward)


@pytest.mark.parametrize("name", PEERS)
def test_same_state_dict_and_a_seed_gives_the_same_weights(name):
    args, kwargs = SIZES[name]
    states = []
    for module in (getattr(nn, name), getattr(torch.nn, name)):
        torch.manual_seed(5)
        states.append(module(*args, **kwargs).state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    pair(name, *args, **kwargs)  # loads strictly both ways


@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("TransformerEncoder", "TransformerDecoder")])
def test_dtype_and_device_reach_every_parameter(name):
    args, kwargs = SIZES[name]
    if name == "CrossEntropyLoss":
        return  # takes neither
    module = getattr(nn, name)(*args, **kwargs, device="meta", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in module.parameters())


def test_other_names_are_torch_nns():
    assert nn.Linear is torch.nn.Linear and nn.Module is torch.nn.Module
    with pytest.raises(AttributeError):
        nn.NoSuchModule  # noqa: B018


@pytest.mark.parametrize("name", ["Transformer", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_modules_are_ours_all_the_way_down(name):
    """No layer, norm or attention of torch.nn's own is left inside."""
    module = getattr(nn, name)(*SIZES[name][0])
    kinds = {type(m) for m in module.modules()}
    assert not kinds & {getattr(torch.nn, n) for n in PEERS}
    assert {nn.MultiheadAttention, nn.LayerNorm} <= kinds


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.FeedForward(8, 16, activation="tanh"), "FeedForward: activation 'tanh' is not one of gelu"),
        (lambda: nn.Fp8Linear(8, 16, scaling="row"), "Fp8Linear: scaling 'row' is not one of tensor, block"),
        (lambda: nn.FeedForward(8, 16, dropout=1.0), r"FeedForward: dropout must lie in \[0, 1\), got 1.0"),
        (lambda: nn.TransformerEncoderLayer(8, 2, activation="tanh"), "TransformerEncoderLayer: activation 'tanh'"),
        (lambda: nn.TransformerDecoderLayer(8, 2, activation="tanh"), "TransformerDecoderLayer: activation 'tanh'"),
        (lambda: nn.LinearCrossEntropyLoss(8, 5, out_features=(2, 3)), r"out_features \(2, 3\) is not supported"),
        (lambda: nn.LinearCrossEntropyLoss(8, 5, weight=torch.ones(4)), r"weight has shape \(4,\); expected \(5,\)"),
        (
            lambda: nn.LinearCrossEntropyLoss(8, 5, label_smoothing=1.5),
            r"label_smoothing must lie in \[0, 1\], got 1.5",
        ),
        (lambda: nn.LinearCrossEntropyLoss(8, 5, reduction="max"), "reduction is 'max'"),
        (lambda: nn.CrossEntropyLoss(reduction="max"), "reduction is 'max'"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=-0.1), "label_smoothing must lie"),
        (lambda: nn.CrossEntropyLoss(weight=torch.ones(2, 2)), "weight has shape"),
        (lambda: nn.MultiheadAttention(9, 2), r"num_heads \(2\) must divide embed_dim \(9\)"),
        (lambda: nn.MultiheadAttention(8, 2, dropout=1.5), r"dropout must lie in \[0, 1\), got 1.5"),
        (lambda: nn.TransformerEncoderLayer(9, 2), "num_heads"),
        (lambda: nn.TransformerEncoderLayer(8, 2, dropout=-0.5), "dropout"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
