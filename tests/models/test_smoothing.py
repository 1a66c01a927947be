"""Label smoothing beside PyTorch's and beside the distributions that fairseq and OpenNMT-py train towards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.models.heads import TokenHead, class_loss
from llmengine.models.smoothing import Smoothing

from .peers import random_ids

V, D, PAD, EPSILON = 23, 12, 3, 0.2
SHAPE = {"vocab_size": V, "d_model": D, "n_layers": 1, "n_heads": 2, "d_ff": 24, "max_positions": 16,
         "pad_token_id": PAD, "dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0,
         "init_std": 0.3}  # fmt: skip
CONVENTIONS = ("torch", "fairseq", "opennmt")
conventions = pytest.mark.parametrize("convention", CONVENTIONS)


def expected(convention: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the labelled rows, in float64, from the distribution that each convention trains towards."""
    logits, labels = logits[labels != -100].double(), labels[labels != -100]
    classes = logits.shape[1]
    if convention == "torch":
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=EPSILON, reduction="sum")
    target = torch.full_like(logits, EPSILON / (classes - (1 if convention == "fairseq" else 2)))
    if convention == "opennmt":
        target[:, PAD] = 0
    target.scatter_(1, labels[:, None], 1 - EPSILON)
    if convention == "opennmt":
        target[labels == PAD] = 0
        return torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="sum")
    return -(target * logits.log_softmax(1)).sum()


def config(convention: str, objective: str = "mlm", architecture: str = "encoder", **fields) -> TransformerConfig:
    fields = {"smoothing": convention, "label_smoothing": EPSILON} | fields
    return TransformerConfig.from_dict(SHAPE | {"architecture": architecture, "objectives": [objective], **fields})


def some_labels(count: int = 40) -> Tensor:
    labels = torch.randint(V, (count,), generator=torch.Generator().manual_seed(1))
    labels[::3] = -100
    return labels


@conventions
@pytest.mark.parametrize("fields", [{}, {"head_bias": True, "head_transform": True, "logit_softcap": 2.0},
                                    {"tie_embeddings": False, "head_scale": 0.3}])  # fmt: skip
def test_a_token_heads_loss_and_gradients(convention, fields):
    head = TokenHead(config(convention, **fields)).double()
    torch.manual_seed(0)
    x, tied = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (40, V))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    labels = some_labels()
    labels[:2] = torch.tensor([PAD, -100])
    inputs = [x, *head.parameters(), *([tied] if head.weight is None else [])]
    loss = head.loss(x, tied, labels, 7)
    oracle = expected(convention, head(x, tied), labels) / 7
    torch.testing.assert_close(loss, oracle)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(oracle, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    counted = labels[labels != (PAD if convention == "opennmt" else -100)]
    mean = head.loss(x, tied, labels, None)
    torch.testing.assert_close(mean, oracle * 7 / int((counted != -100).sum()))
    plain = torch.nn.functional.cross_entropy(head(x, tied), labels, reduction="sum")
    torch.testing.assert_close(head.eval().loss(x, tied, labels, 7), plain / 7)


@conventions
def test_no_labels_no_loss(convention):
    head = TokenHead(config(convention))
    x, tied = (torch.randn(n, D, requires_grad=True) for n in (5, V))
    loss = head.loss(x, tied, torch.full((5,), -100), None)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not tied.grad.any()


@conventions
def test_half_precision(convention):
    """Rounded inputs, float32 sums: as near to float64 as the plain loss is."""
    head = TokenHead(config(convention)).bfloat16()
    x, tied = torch.randn(40, D).bfloat16(), torch.randn(V, D).bfloat16()
    labels = some_labels()
    loss = head.loss(x, tied, labels, None)
    counted = labels[(labels != -100) & ((labels != PAD) | (convention != "opennmt"))]
    oracle = expected(convention, x.double() @ tied.double().T, labels) / len(counted)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-3, atol=1e-3)


@conventions
@pytest.mark.parametrize("objective, architecture, fields", [
    ("mlm", "encoder", {}), ("clm", "decoder", {}), ("seq2seq", "encoder_decoder", {"decoder_start_token_id": 0}),
    ("plm", "encoder", {"positions": "relative", "norm_place": "post", "final_norm": False}),
])  # fmt: skip
def test_a_models_loss(convention, objective, architecture, fields):
    torch.manual_seed(0)
    model = Transformer(config(convention, objective, architecture, **fields)).train()
    ids = random_ids(2, 6, seed=3) % V
    labels = torch.where(torch.arange(6) < 5, ids, -100)
    out = model(ids, labels=labels)
    logits = out.logits
    if objective == "clm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.flatten()
    counted = labels[(labels != -100) & ((labels != PAD) | (convention != "opennmt"))]
    torch.testing.assert_close(
        out.loss.double(), expected(convention, logits.flatten(0, 1), labels) / len(counted), rtol=1e-5, atol=1e-5
    )
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        measured = model.eval()(ids, labels=torch.where(torch.arange(6) < 5, ids, -100)).loss
    torch.testing.assert_close(measured, plain)


@pytest.mark.parametrize("convention", ["torch", "fairseq"])
@pytest.mark.parametrize("objective", ["classification", "tagging"])
def test_classifiers(convention, objective):
    torch.manual_seed(0)
    model = Transformer(config(convention, objective, n_labels=5)).train()
    ids = random_ids(3, 6, seed=3) % V
    labels = torch.tensor([4, 0, 1]) if objective == "classification" else ids % 5
    out = model(ids, labels=labels)
    logits = out.logits.flatten(0, -2)
    torch.testing.assert_close(out.loss.double(), expected(convention, logits, labels.flatten()) / labels.numel())
    plain = torch.nn.functional.cross_entropy(logits, labels.flatten())
    torch.testing.assert_close(model.eval()(ids, labels=labels).loss, plain)


def test_known_numbers():
    smoothings = {name: Smoothing(config(name, label_smoothing=0.1)) for name in CONVENTIONS}
    assert smoothings["torch"].spread(11) == 0.1
    assert smoothings["fairseq"].spread(11) == pytest.approx(0.1 * 11 / 10)
    assert smoothings["opennmt"].spread(11) == pytest.approx(0.1 * 11 / 9)
    logits, labels, none = (
        torch.randn(4, 11),
        torch.tensor([0, 1, 2, 10]),
        Smoothing(config("torch", label_smoothing=0.0)),
    )
    assert class_loss(logits, labels, None, none) == class_loss(logits, labels, None)


@conventions
def test_compiled(convention):
    """Under torch.compile unlabelled tokens go through the head too, and add nothing."""
    head = TokenHead(config(convention))
    x, tied, labels = torch.randn(40, D), torch.randn(V, D), some_labels()
    compiled = torch.compile(head.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, tied, labels, 7), head.loss(x, tied, labels, 7))


def test_files_hold_no_smoothing(tmp_path):
    """Hugging Face's config has no such field: it belongs to a run."""
    model = Transformer(
        TransformerConfig.preset("gpt-tiny", vocab_size=61, label_smoothing=0.1, smoothing="fairseq", n_layers=1)
    )
    model.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config.label_smoothing == 0
    again = Transformer.from_pretrained(tmp_path, label_smoothing=0.1)
    assert again.config.label_smoothing == 0.1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"label_smoothing": 1.0}, "label_smoothing: Input should be less than 1"),
        ({"smoothing": "keras"}, "smoothing: Input should be 'torch', 'fairseq' or 'opennmt'"),
        ({"smoothing": "fairseq", "vocab_size": 4, "label_smoothing": 0.8}, "with vocab_size 4 at most 0.75"),
        ({"smoothing": "opennmt", "pad_token_id": None}, 'smoothing "opennmt" needs pad_token_id'),
        ({"smoothing": "opennmt", "eos_token_id": PAD}, "never trains pad_token_id, but 3 ends texts too"),
        ({"smoothing": "opennmt", "objectives": ["classification"]}, "have no padding"),
        ({"objectives": ["classification"], "problem": "multi"}, "label_smoothing is for one class each"),
        ({"objectives": ["tagging"], "crf": True}, "label_smoothing is for one class each"),
    ],
)
def test_what_does_not_fit(fields, message):
    fields = SHAPE | {"architecture": "encoder", "objectives": ["mlm"], "label_smoothing": EPSILON} | fields
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(fields)
