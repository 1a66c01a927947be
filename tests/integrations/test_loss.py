"""The loss of a head whose logits are not computed: by the model's own rules, and there for who reads them."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmengine.integrations.transformers import accelerate
from llmengine.integrations.transformers.logits import DeferredLogits, Recipe

from .families import FAMILIES, VOCABULARY, batch, build, run

F = torch.nn.functional


def deferred(classes: int = 13, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[DeferredLogits, ...]:
    """Logits of a head, deferred and computed; both lead to the same leaves."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(classes, 8, generator=g).to(dtype).requires_grad_()
    b = torch.randn(classes, generator=g).to(dtype).requires_grad_() if bias else None
    return DeferredLogits(Recipe(hidden, weight, b), dtype), F.linear(hidden, weight, b), hidden, weight


def targets(classes: int = 13) -> torch.Tensor:
    labels = torch.randint(classes, (2, 5), generator=torch.Generator().manual_seed(1))
    return labels.masked_fill(torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 0, 0]).bool().view(2, 5), -100)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_model_computes_logits_for_its_loss(family):
    """Until they are read, which gives what Transformers gives."""
    model = build(family)
    expected = model(**batch(family)).logits
    output = accelerate(model)(**batch(family))
    output.loss.backward()
    assert type(output.logits) is DeferredLogits and output.logits.computed is None
    assert (output.logits.shape, output.logits.dtype) == (expected.shape, expected.dtype)
    assert output.logits.computed is None
    torch.testing.assert_close(output.logits.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "modernbert", "bert"])
def test_num_items_in_batch(family, items):
    """Those that honour it do, and those that drop it (BERT: transformers#47688) drop it."""
    model, inputs = build(family), batch(family, "right") | {"num_items_in_batch": items}
    expected = run(model, inputs)
    got = run(accelerate(model), inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)
    del inputs["num_items_in_batch"]
    assert (run(model, inputs)[0] == got[0]) == (family == "bert")


def test_only_in_training_with_labels():
    model, inputs = accelerate(build("gpt2")), batch("gpt2")
    assert type(model(input_ids=inputs["input_ids"]).logits) is torch.Tensor
    with torch.no_grad():
        assert type(model(**inputs).logits) is torch.Tensor
    assert type(model.eval()(**inputs).logits) is torch.Tensor
    model.train().lm_head.register_forward_hook(lambda module, args, output: None)
    assert type(model(**inputs).logits) is torch.Tensor


def test_memory_of_the_logits_is_not_spent():
    """Largest allocation of a step, against one with the logits (128 MiB): ours are a block of half the tokens."""
    config = transformers.GPT2Config(
        vocab_size=32768, n_embd=32, n_layer=1, n_head=2, n_positions=1024, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(32768, (1, 1024))

    def largest() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return max(event.cpu_memory_usage for event in profile.events())

    logits = 4 * 1024 * 32768
    parameters = 4 * 32 * 32768
    assert largest() >= logits > 2 * parameters
    accelerate(model)
    assert largest() <= 0.55 * logits


SYMBOLIC = {
    "flat": lambda z: z.view(-1, 13),
    "flat, by its size": lambda z: z.reshape(-1, z.size(-1)).contiguous(),
    "float": lambda z: z.float().view(-1, z.shape[-1]),
    "bias": lambda z: (z + torch.arange(13.0).view(1, 13)).view(-1, 13),
    "scaled": lambda z: (z * 0.25).view(10, 13),
    "divided": lambda z: (z / 8.0).view(torch.Size([10, 13])),
    "capped": lambda z: (torch.tanh(z / 3.0) * 3.0).view(-1, 13),
    "capped in place of dtype": lambda z: ((z.float() / 3.0).tanh() * 3.0).view(-1, 13),
}
COMPUTED = {
    "another cap": lambda z: (torch.tanh(z / 3.0) * 2.0).view(-1, 13),
    "tanh": lambda z: torch.tanh(z).tanh().view(-1, 13),
    "shifted": lambda z: torch.cat([z[..., 1:, :], z[..., :1, :]], 1).reshape(-1, 13),
    "bias after scale": lambda z: (z * 2.0 + torch.ones(13)).view(-1, 13),
    "bias by rows": lambda z: (z + torch.arange(5.0).view(5, 1)).view(-1, 13),
    "two heads": lambda z: (z + z).view(-1, 13),
    "times a tensor": lambda z: (z * torch.full((13,), 0.5)).view(-1, 13),
    "halves": lambda z: z.masked_fill(torch.arange(13) > 11, -1e4).view(-1, 13),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [*SYMBOLIC, *COMPUTED])
def test_between_head_and_loss(path, dtype):
    """What is known stays symbolic, what is not is computed first; both give the loss and gradients of the logits."""
    change = (SYMBOLIC | COMPUTED)[path]
    lazy, logits, hidden, weight = deferred(dtype=dtype)
    on_the_way = change(lazy)
    assert (type(on_the_way) is DeferredLogits) == (path in SYMBOLIC or path == "another cap")
    loss, expected = (F.cross_entropy(z, targets().view(-1)) for z in (on_the_way, change(logits)))
    got = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for mine, theirs in zip((loss, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_options_of_the_loss():
    for options in (
        {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}, {"label_smoothing": 0.1},
        {"weight": torch.linspace(0.5, 2, 13)},
    ):  # fmt: skip
        lazy, logits, *_ = deferred()
        labels = targets().view(-1)
        labels = labels.masked_fill(labels == -100, 3) if "ignore_index" in options else labels
        got = torch.nn.CrossEntropyLoss(**options)(lazy.view(-1, 13), labels)
        assert lazy.computed is None
        torch.testing.assert_close(got, F.cross_entropy(logits.view(-1, 13), labels, **options), rtol=1e-5, atol=1e-5)

    lazy, logits, *_ = deferred()
    chances = logits.detach().softmax(-1)  # class probabilities are PyTorch's to compute
    got = F.cross_entropy(lazy.view(-1, 13), chances.view(-1, 13))
    torch.testing.assert_close(got, F.cross_entropy(logits.view(-1, 13), chances.view(-1, 13)))
    got = F.cross_entropy(lazy.transpose(1, 2), targets())
    torch.testing.assert_close(got, F.cross_entropy(logits.transpose(1, 2), targets()))


def test_changed_in_place():
    lazy, logits, hidden, _ = deferred()
    logits = logits.clone()
    for z in (lazy, logits):
        z.div_(2.0)
        z[..., 5] = -1e4
    loss, expected = (F.cross_entropy(z.view(-1, 13), targets().view(-1)) for z in (lazy, logits))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_reads_as_a_tensor():
    lazy, logits, *_ = deferred()
    assert isinstance(lazy, torch.Tensor) and "tensor(" in repr(lazy) and lazy.computed is not None
    assert torch.equal(lazy.argmax(-1), logits.argmax(-1)) and torch.equal(lazy[0, 1], logits[0, 1])
    assert torch.equal(torch.stack([lazy, lazy]), torch.stack([logits, logits]))
    assert lazy.sum().requires_grad and lazy.tolist() == logits.tolist() and (lazy.numpy(force=True) == 0).sum() == 0


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_under_autocast(family):
    """bfloat16 products, a float32 loss; the logits, if read, are autocast's."""
    model, inputs = build(family), batch(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, inputs)
        output = accelerate(model)(**inputs)
        output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), expected[0], rtol=2e-2, atol=2e-2, check_dtype=False)
    assert output.loss.dtype == torch.float32 and output.logits.dtype == torch.bfloat16
    assert output.logits.argmax(-1).max() < VOCABULARY
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_models_in_bfloat16(family):
    """Farther from float32 than Transformers' own bfloat16 is by little."""
    exact = run(build(family), batch(family))
    theirs = run(build(family).bfloat16(), batch(family))
    ours = run(accelerate(build(family).bfloat16()), batch(family))

    def distance(result):
        return sum((result[2][name].float() - g).square().sum() for name, g in exact[2].items()).sqrt().item()

    assert abs(ours[0].item() - exact[0].item()) <= 2 * abs(theirs[0].item() - exact[0].item()) + 1e-2
    assert distance(ours) <= 1.5 * distance(theirs)
