"""FeedForward, the transformer layers and their stacks against torch.nn's, and what runs fused."""

from __future__ import annotations

import pytest
import torch

from llmengine import nn
from llmengine.nn.feed_forward import ACTIVATIONS
from llmengine.nn.stack import is_causal_mask
from llmengine.testing import assert_near

from .peers import additive, compare, forbidden, pair, randn, random_mask

BATCH, LENGTH, MEMORY, WIDTH, HEADS, INNER = 3, 5, 6, 8, 2, 12
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
places = pytest.mark.parametrize(
    ("batch_first", "norm_first"), [(a, b) for a in (False, True) for b in (False, True)], ids=str
)


def batch(length: int, batch_first: bool, seed: int = 0) -> torch.Tensor:
    x = randn(BATCH, length, WIDTH, seed=seed)
    return x if batch_first else x.transpose(0, 1).contiguous()


def encoder_masks(kind: str) -> dict:
    padding = forbidden([5, 2, 3], LENGTH)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "shared": {"src_mask": random_mask(LENGTH, LENGTH)},
        "float": {"src_mask": additive(random_mask(BATCH * HEADS, LENGTH, LENGTH))},
        "both": {"src_mask": random_mask(LENGTH, LENGTH), "src_key_padding_mask": padding},
        "causal": {"src_mask": CAUSAL, "is_causal": True},
        "causal padding": {"src_mask": CAUSAL, "is_causal": True, "src_key_padding_mask": padding},
    }[kind]


ENCODER_KINDS = ["none", "padding", "shared", "float", "both", "causal", "causal padding"]


def decoder_masks(kind: str) -> dict:
    return {
        "none": {},
        "padding": {
            "tgt_key_padding_mask": forbidden([5, 2, 3], LENGTH),
            "memory_key_padding_mask": forbidden([6, 1, 4], MEMORY),
        },
        "masks": {
            "tgt_mask": random_mask(LENGTH, LENGTH),
            "memory_mask": additive(random_mask(BATCH * HEADS, LENGTH, MEMORY)),
        },
        "causal": {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": forbidden([6, 1, 4], MEMORY)},
    }[kind]


DECODER_KINDS = ["none", "padding", "masks", "causal"]


@places
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_encoder_layer(kind, training, batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    ours, theirs = pair("TransformerEncoderLayer", WIDTH, HEADS, INNER, **options)
    compare(ours.train(training), theirs.train(training), batch(LENGTH, batch_first), **encoder_masks(kind))


@places
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_decoder_layer(kind, training, batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    ours, theirs = pair("TransformerDecoderLayer", WIDTH, HEADS, INNER, **options)
    x, memory = batch(LENGTH, batch_first), batch(MEMORY, batch_first, seed=1)
    compare(ours.train(training), theirs.train(training), x, memory, **decoder_masks(kind))


@pytest.mark.parametrize("options", [{"bias": False}, {"layer_norm_eps": 0.1}, {"norm_first": True, "bias": False}])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layer_options(name, options):
    x = batch(LENGTH, False)
    compare(*pair(name, WIDTH, HEADS, INNER, 0.0, **options), *([x] if "Encoder" in name else [x, x]))


@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", torch.relu, torch.nn.functional.silu, torch.nn.GELU("tanh"), torch.tanh],
    ids=["relu", "gelu", "torch.relu", "silu", "GELU(tanh)", "tanh"],
)
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_activations(name, activation):
    ours, theirs = pair(name, WIDTH, HEADS, INNER, 0.0, activation)
    x = batch(LENGTH, False)
    compare(ours, theirs, *([x] if "Encoder" in name else [x, x]))
    fused = ours.unfused_because() is None
    assert fused == (activation is not torch.tanh), ours.unfused_because()


def test_an_eval_mode_without_gradients_equals_torch_nns_fast_path():
    ours, theirs = pair("TransformerEncoderLayer", WIDTH, HEADS, INNER, batch_first=True)
    x, padding = batch(LENGTH, True), forbidden([5, 2, 3], LENGTH)
    with torch.no_grad():
        expected, got = (m.eval()(x, src_key_padding_mask=padding) for m in (theirs, ours))
    assert_near(got[~padding], expected[~padding], 1e-12)


@places
@pytest.mark.parametrize("final_norm", [False, True])
def test_stacks(final_norm, batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    x, memory = batch(LENGTH, batch_first), batch(MEMORY, batch_first, seed=1)
    for name, args, masks in (
        ("TransformerEncoder", (x,), {"mask": CAUSAL, "src_key_padding_mask": forbidden([5, 2, 3], LENGTH)}),
        ("TransformerDecoder", (x, memory), decoder_masks("causal")),
    ):
        modules = []
        for room in (nn, torch.nn):
            torch.manual_seed(0)
            layer = getattr(room, f"{name}Layer")(WIDTH, HEADS, INNER, **options)
            norm = room.LayerNorm(WIDTH) if final_norm else None
            extra = {"enable_nested_tensor": False} if room is torch.nn and "Encoder" in name else {}
            modules.append(getattr(room, name)(layer, 2, norm, **extra).double())
        ours, theirs = modules
        ours.load_state_dict(theirs.state_dict(), strict=True)
        compare(ours, theirs, *args, **masks)


@places
def test_transformer(batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    ours, theirs = pair("Transformer", WIDTH, HEADS, 2, 2, INNER, **options)
    src, tgt = batch(MEMORY, batch_first, seed=1), batch(LENGTH, batch_first)
    compare(ours, theirs, src, tgt)
    padding = forbidden([6, 1, 4], MEMORY)
    compare(
        ours,
        theirs,
        src,
        tgt,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64),
        src_mask=additive(random_mask(MEMORY, MEMORY)),
        src_key_padding_mask=padding,
        tgt_key_padding_mask=forbidden([5, 2, 3], LENGTH),
        memory_key_padding_mask=padding,
        tgt_is_causal=True,
    )
    compare(ours, theirs, src[0] if batch_first else src[:, 0], tgt[0] if batch_first else tgt[:, 0])  # unbatched


def test_transformer_takes_custom_stacks():
    encoder, decoder = torch.nn.Identity(), torch.nn.Identity()
    ours = nn.Transformer(WIDTH, HEADS, custom_encoder=encoder, custom_decoder=decoder)
    assert ours.encoder is encoder and ours.decoder is decoder


def test_the_causal_mask_is_recognised():
    square = nn.Transformer.generate_square_subsequent_mask(4)
    assert torch.equal(square, torch.nn.Transformer.generate_square_subsequent_mask(4))
    assert is_causal_mask(square, None) and is_causal_mask(square == -torch.inf, None)
    biased = square.clone()
    biased[2, 0] = 0.5
    for mask in (None, biased, square.T, square[:2], torch.zeros(4, 4).bool(), square.expand(2, 4, 4)):
        assert not is_causal_mask(mask, None)
    assert is_causal_mask(biased, True) and not is_causal_mask(square, False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_feed_forward_is_its_formula(activation, gated, bias):
    ours = nn.FeedForward(WIDTH, INNER, activation=activation, gated=gated, bias=bias).double()

    class Formula(torch.nn.Module):
        """The same leaves, each called."""

        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = ours.up, ours.gate, ours.down

        def forward(self, x):
            act = ACTIVATIONS[activation]
            return self.down(act(self.gate(x)) * self.up(x) if gated else act(self.up(x)))

    assert ours.unfused_because() is None
    compare(ours, Formula(), randn(2, 3, WIDTH))
    compare(ours, Formula(), randn(WIDTH))


class Adapted(torch.nn.Linear):
    """What an adapter makes of a linear layer."""

    def forward(self, input):
        return super().forward(input) + 1


def adapt(layer: torch.nn.Module, name: str) -> None:
    old = getattr(layer, name)
    new = Adapted(old.in_features, old.out_features, dtype=old.weight.dtype)
    new.load_state_dict(old.state_dict())
    setattr(layer, name, new)


@pytest.mark.parametrize("leaf", ["up", "gate", "down"])
def test_a_replaced_leaf_is_called(leaf):
    ours = nn.FeedForward(WIDTH, INNER, gated=True).double()
    x = randn(3, WIDTH)
    plain = ours(x)
    adapt(ours, leaf)
    assert ours.unfused_because() == f"{leaf} is a Adapted"
    act = ACTIVATIONS["gelu"]
    assert not torch.allclose(ours(x), plain)
    assert_near(ours(x), ours.down(act(ours.gate(x)) * ours.up(x)), 1e-12)


@pytest.mark.parametrize("leaf", ["linear1", "linear2", "norm1", "norm2", "self_attn", "dropout1", "dropout"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_hooked_leaves_of_a_layer_are_called_and_change_nothing(leaf, norm_first):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, norm_first=norm_first).double()
    x = randn(LENGTH, BATCH, WIDTH)
    plain = layer(x)
    calls = []
    getattr(layer, leaf).register_forward_hook(lambda *_: calls.append(leaf))
    assert_near(layer(x), plain, 1e-12)
    assert calls == [leaf]


def test_dropout_in_training_keeps_the_mean():
    """Every dropout of the layer is in use in training only, and with torch.nn's rate."""
    torch.manual_seed(0)
    ours, theirs = pair("TransformerEncoderLayer", WIDTH, HEADS, INNER, dropout=0.3, norm_first=True)
    x = randn(1, 20000, WIDTH)
    means, deviations = zip(*((y.mean((0, 1)), y.std((0, 1))) for y in (m(x) for m in (ours, theirs))), strict=True)
    torch.testing.assert_close(means[0], means[1], rtol=0.05, atol=0.05)
    torch.testing.assert_close(deviations[0], deviations[1], rtol=0.05, atol=0.05)
    assert not torch.equal(ours(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nn.Transformer(8, 2, 1, 1)(torch.ones(5, 2, 8), torch.ones(5, 3, 8)),
            "src has a batch of 2, tgt of 3",
        ),
        (lambda: nn.Transformer(8, 2, 1, 1)(torch.ones(5, 2, 8), torch.ones(5, 2, 7)), "tgt has 7 features"),
        (lambda: nn.Transformer(8, 2, 1, 1)(torch.ones(5, 2, 7), torch.ones(5, 2, 8)), "src has 7 features"),
        (lambda: nn.FeedForward(8, 16)(torch.ones(2, 7)), "w_up has shape"),
        (lambda: nn.TransformerEncoderLayer(8, 2)(torch.ones(5, 2, 7)), "query has 7 features"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
