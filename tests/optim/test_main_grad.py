"""Gradients that gather in float32 buffers: of many micro-batches, beside float64; by every way that they come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as plain
from torch.nn.parallel import DistributedDataParallel

import llmengine
from llmengine import functional
from llmengine.functional.linear import products
from llmengine.models import Transformer, TransformerConfig
from llmengine.nn import fusing
from llmengine.optim import AdamW, MainGradients
from llmengine.training.distributed import sum_gradients

MICRO_BATCHES, TOKENS, D, F, CLASSES = 64, 40, 24, 56, 90
HALF = {"cpu": torch.bfloat16, "reference": torch.bfloat16, "triton": torch.float16}


def weights(**shapes: tuple[int, int]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=g) / shape[1] ** 0.5 for name, shape in shapes.items()}


def linear(x: Tensor, p: dict[str, Tensor], _target: Tensor) -> Tensor:
    return products(x, p["w"]).square().sum()


def ffn(x: Tensor, p: dict[str, Tensor], _target: Tensor) -> Tensor:
    return functional.ffn(x, p["up"], p["down"], w_gate=p["gate"], activation="silu", recompute=True).square().sum()


def head(x: Tensor, p: dict[str, Tensor], target: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, p["head"], target, reduction="sum", label_smoothing=0.1)


def shard(x: Tensor, p: dict[str, Tensor], target: Tensor) -> Tensor:
    whole = functional.VocabularyShard(0, CLASSES)
    return functional.linear_cross_entropy(x, p["head"], target, reduction="sum", label_smoothing=0.1, shard=whole)


def plain_ffn(x: Tensor, p: dict[str, Tensor], _target: Tensor) -> Tensor:
    hidden = plain.silu(plain.linear(x, p["gate"])) * plain.linear(x, p["up"])
    return plain.linear(hidden, p["down"]).square().sum()


def plain_head(x: Tensor, p: dict[str, Tensor], target: Tensor) -> Tensor:
    return plain.cross_entropy(plain.linear(x, p["head"]), target, reduction="sum", label_smoothing=0.1)


def plain_linear(x: Tensor, p: dict[str, Tensor], _target: Tensor) -> Tensor:
    return plain.linear(x, p["w"]).square().sum()


Loss = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]
CASES: dict[str, tuple[Loss, Loss, dict[str, Tensor]]] = {
    "linear": (linear, plain_linear, weights(w=(F, D))),
    "ffn": (ffn, plain_ffn, weights(up=(F, D), gate=(F, D), down=(D, F))),
    "head": (head, plain_head, weights(head=(CLASSES, D))),
    "shard": (shard, plain_head, weights(head=(CLASSES, D))),
}


def micro_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(TOKENS, D, generator=g), torch.randint(CLASSES, (TOKENS,), generator=g)) for _ in range(count)]


def accumulated(loss: Loss, given: dict[str, Tensor], dtype: torch.dtype, *, main: bool, count: int, values=None):
    """The gradients of `count` micro-batches; x and weights are numbers of the dtype `values`."""
    p = {name: nn.Parameter(w.to(values or dtype).to(dtype)) for name, w in given.items()}
    if main:
        MainGradients(p.values())
    for x, target in micro_batches(count):
        loss(x.to(values or dtype).to(dtype), p, target).backward()
        assert not main or all(w.grad is None for w in p.values())
    return {name: w.main_grad if main else w.grad for name, w in p.items()}


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


# Triton has no linear layer
PLACES = [(backend, name) for backend in HALF for name in CASES if (backend, name) != ("triton", "linear")]


@pytest.mark.parametrize("backend, name", PLACES)
def test_micro_batches_add_up_in_float32(backend: str, name: str):
    """Against plain PyTorch in float64 on the same 16-bit numbers: a buffer has the error of one micro-batch's kernel,
    and of a linear layer, whose operands are exact, float32's; .grad has the roundings of its additions."""
    loss, oracle, given = CASES[name]
    half, count = HALF[backend], 8 if backend == "triton" else MICRO_BATCHES
    exact = accumulated(oracle, given, torch.float64, main=False, count=count, values=half)
    with llmengine.backend(backend):
        ours = accumulated(loss, given, half, main=True, count=count)
        rounded = accumulated(loss, given, half, main=False, count=count)
    for key in given:
        assert ours[key].dtype == torch.float32
        assert error(ours[key], exact[key]) < error(rounded[key], exact[key]) / (1.5 if backend == "triton" else 2), key


@pytest.mark.parametrize("backend, name", PLACES)
def test_additions_to_a_buffer_have_float32s_rounding_alone(backend: str, name: str):
    """Beside the sum in float64 of what each micro-batch alone puts into a buffer: one rounding an addition."""
    loss, _, given = CASES[name]
    half, count = HALF[backend], 4 if backend == "triton" else MICRO_BATCHES
    p = {key: nn.Parameter(w.to(half)) for key, w in given.items()}
    MainGradients(p.values())
    exact = {key: torch.zeros(w.shape, dtype=torch.float64) for key, w in given.items()}
    largest = dict(exact)
    with llmengine.backend(backend):
        for x, target in micro_batches(count):
            q = {key: nn.Parameter(w.to(half)) for key, w in given.items()}
            MainGradients(q.values())
            loss(x.to(half), q, target).backward()
            loss(x.to(half), p, target).backward()
            for key in given:
                exact[key] = exact[key] + q[key].main_grad.double()
                largest[key] = torch.maximum(largest[key], exact[key].abs())
    for key in given:
        bound = count * 2.0**-24 * (largest[key] + 1e-6)
        assert ((p[key].main_grad.double() - exact[key]).abs() <= bound).all(), key
        assert exact[key].abs().max() > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32_weights_have_in_their_buffers_what_is_otherwise_their_grad(backend: str):
    for name, (loss, oracle, given) in CASES.items():
        with llmengine.backend(backend):
            ours = accumulated(loss, given, torch.float32, main=True, count=3)
        theirs = accumulated(oracle, given, torch.float32, main=False, count=3)
        for key in given:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def tiny(**fields) -> Transformer:
    sizes = {"vocab_size": CLASSES, "d_model": D, "n_layers": 2, "n_heads": 2, "d_ff": F, "max_positions": 32}
    without = dict.fromkeys(("dropout", "attention_dropout", "embed_dropout"), 0.0)
    config = TransformerConfig.preset("gpt2", **sizes, **without, bos_token_id=1, eos_token_id=2, **fields)
    torch.manual_seed(0)
    return Transformer(config).train()


def batch(seed: int) -> dict[str, Tensor]:
    tokens = torch.randint(CLASSES, (3, 11), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_models_gradients_all_gather_in_the_buffers(compiled: bool, monkeypatch):
    """Of fused weights, of biases, norms and embeddings (here tied to the head), and, compiled, all by the hook. Here
    as on a processor where PyTorch's products are the quicker ones."""
    monkeypatch.setattr(fusing, "FROM_ROWS", None)
    monkeypatch.setattr("llmengine.backends.cpu.linear.FROM_ROWS", None)
    model, exact = tiny().bfloat16(), tiny().bfloat16().float()
    mains = MainGradients(model.parameters())
    call = torch.compile(model, backend="aot_eager") if compiled else model
    for seed in range(3):
        call(**batch(seed)).loss.backward()
        exact(**batch(seed)).loss.backward()
        assert all(p.grad is None for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.main_grad.dtype == torch.float32
        assert error(p.main_grad, q.grad.double()) < 0.03, name
    mains.zero()
    assert not any(g.any() for g in mains.gradients())
    mains.remove()
    model(**batch(0)).loss.backward()
    assert all(p.grad is not None and not hasattr(p, "main_grad") for p in model.parameters())


def test_recomputing_blocks_change_no_bit_of_a_models_gradients():
    found = []
    for recompute in (False, True):
        model = tiny(activation_dropout=0.2)
        model.recompute_feed_forward(recompute)
        torch.manual_seed(4)
        model(**batch(0)).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_weight_that_is_used_twice_and_a_graph_that_is_walked_twice():
    loss, oracle, given = CASES["linear"]
    x, other = (x for x, _ in micro_batches(2))
    p, q = (nn.Parameter(given["w"].clone()) for _ in range(2))
    MainGradients([p])
    total = loss(x, {"w": p}, x) + loss(other, {"w": p}, x)
    total.backward(retain_graph=True)
    total.backward()
    (2 * (oracle(x, {"w": q}, x) + oracle(other, {"w": q}, x))).backward()
    torch.testing.assert_close(p.main_grad, q.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_and_one_that_is_computed_have_no_buffer_to_add_to():
    x = torch.randn(5, D, requires_grad=True)
    frozen = nn.Parameter(torch.randn(F, D), requires_grad=False)
    MainGradients([frozen])
    frozen.main_grad = torch.zeros(F, D)
    products(x, frozen).sum().backward()
    assert not frozen.main_grad.any()
    leaf = nn.Parameter(torch.randn(F, D))
    MainGradients([leaf])
    products(x, leaf * 2).sum().backward()  # by autograd, and the hook
    assert leaf.grad is None
    torch.testing.assert_close(leaf.main_grad, (2 * x.sum(0)).detach().expand(F, D))


@pytest.mark.parametrize("name", CASES)
def test_a_weights_hooks_are_given_its_gradient_and_what_they_make_of_it_gathers(name: str):
    loss, _, given = CASES[name]
    p, q = ({key: nn.Parameter(w.clone()) for key, w in given.items()} for _ in range(2))
    x, target = micro_batches(1)[0]
    mains, seen = MainGradients(p.values()), []
    hooks = [w.register_hook(lambda g: seen.append(g.shape)) for w in p.values()]
    hooks += [w.register_hook(lambda g: g * 0.5) for w in p.values()]
    loss(x, p, target).backward()
    loss(x, q, target).backward()
    assert sorted(seen) == sorted(w.shape for w in p.values())
    for key in given:
        torch.testing.assert_close(p[key].main_grad, q[key].grad / 2, rtol=1e-5, atol=1e-6)
    mains.zero()
    for hook in hooks:
        hook.remove()
    loss(x, p, target).backward()  # by the kernel again
    for key in given:
        torch.testing.assert_close(p[key].main_grad, q[key].grad, rtol=1e-5, atol=1e-6)
    assert len(seen) == len(given)


@pytest.mark.parametrize("backend", HALF)
@pytest.mark.parametrize("options", [{}, {"master_weights": True}], ids=["", "masters"])
@pytest.mark.parametrize("half", [True, False], ids=["16 bits", "float32"])
def test_adamw_reads_the_buffers(half: bool, options: dict, backend: str):
    """As torch.optim.AdamW on float32 copies, whose .grad the buffers are; rounded to the parameters after the step."""
    g, dtype = torch.Generator().manual_seed(0), HALF[backend] if half else torch.float32
    ours = [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((5, 7), (4097,), ())]
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    mains = MainGradients(ours[:2])  # the last has a .grad, beside them
    optimizer, other = AdamW(ours, 0.1, **options), torch.optim.AdamW(theirs, 0.1)
    for main, q in zip(mains.gradients(), theirs, strict=False):
        main.copy_(torch.randn(main.shape, generator=g))
        q.grad = main.clone()
    ours[2].grad, theirs[2].grad = torch.ones((), dtype=dtype), torch.ones(())
    with llmengine.backend(backend):
        optimizer.step()
    other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.to(dtype), rtol=2**-7 if half else 1e-5, atol=1e-5)
    optimizer.zero_grad()
    assert ours[2].grad is None and not any(main.any() for main in mains.gradients())


def test_a_grad_beside_a_buffer_is_nobodys_guess():
    p = nn.Parameter(torch.zeros(3))
    MainGradients([p])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"^main_grad: a parameter of shape \(3,\) has a .grad beside its buffer"):
        AdamW([p]).step()
    assert not p.any()


def on_rank(rank: int, directory: str) -> None:
    """Two micro-batches of each of two processes, under DistributedDataParallel; then one that it sums."""
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = tiny()
    mains, parallel = MainGradients(model.parameters()), DistributedDataParallel(model)
    with parallel.no_sync():
        for seed in (2 * rank, 2 * rank + 1):
            parallel(**batch(seed)).loss.backward()
    sum_gradients(model)
    torch.save(mains.gradients(), f"{directory}/{rank}")
    parallel(**batch(0)).loss.backward()
    with pytest.raises(RuntimeError, match=r"has a \.grad beside its buffer"):
        AdamW(model.parameters()).step()
    with pytest.raises(RuntimeError, match=r"has a \.grad beside its buffer"):
        sum_gradients(model)
    distributed.destroy_process_group()


def test_buffers_of_processes_add_up_and_no_sum_of_grads_passes_for_them(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path),), 2)
    model = tiny()
    for seed in range(4):
        model(**batch(seed)).loss.backward()
    for rank in range(2):
        for main, p in zip(torch.load(tmp_path / str(rank)), model.parameters(), strict=True):
            torch.testing.assert_close(main, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "main, message",
    [
        (torch.zeros(F, D, dtype=torch.bfloat16), r"is bfloat16 \(56, 24\)"),
        (torch.zeros(D, F), r"is float32 \(24, 56\)"),
        (torch.zeros(D, F).T, r"strides \(1, 56\)"),
        (torch.zeros(F, D, requires_grad=True), "takes no gradient"),
    ],
)
def test_errors_name_the_buffer(main: Tensor, message: str):
    weight = nn.Parameter(torch.zeros(F, D))
    weight.main_grad = main
    with pytest.raises(ValueError, match=rf"^linear: weight.main_grad {message}|^linear: weight.main_grad .*{message}"):
        functional.linear(torch.zeros(3, D), weight)


def test_errors_of_buffers_name_the_parameter():
    p = nn.Parameter(torch.zeros(3, 2))
    MainGradients([p, p])
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 2\) has a main_grad"):
        MainGradients([p])
    with pytest.raises(ValueError, match=r"parameters has a torch\.complex64; allowed: real floating dtypes"):
        MainGradients([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_what_is_frozen_stands_still_and_clipping_never_lengthens():
    from llmengine.optim import gradient_norm

    moving, frozen = (nn.Parameter(torch.ones(3)) for _ in range(2))
    mains = MainGradients([moving, frozen])
    frozen.requires_grad_(False)
    optimizer = AdamW([moving, frozen], lr=0.1, weight_decay=0.1)
    for norm in (0.0, 1e-3):  # neither NaN nor longer than they are
        mains.gradients()[0].fill_(norm)
        optimizer.step(gradient_scale=(1.0 / gradient_norm(mains.gradients())).clamp(max=1.0))
        assert torch.equal(frozen, torch.ones(3)) and moving.isfinite().all()
    assert torch.allclose(optimizer.state[moving]["exp_avg"], torch.tensor(1e-4))


def test_a_grad_that_is_there_joins_its_buffer():
    weight = nn.Parameter(torch.ones(3).bfloat16())
    weight.grad = torch.full_like(weight, 0.5)
    (main,) = MainGradients([weight]).gradients()
    assert weight.grad is None and torch.equal(main, torch.full((3,), 0.5))


def test_a_gradient_scaler_is_refused():
    weight = nn.Parameter(torch.ones(3))
    MainGradients([weight])
    optimizer = AdamW([weight])
    optimizer.found_inf = torch.zeros(())  # as torch.amp.GradScaler.step sets it
    with pytest.raises(RuntimeError, match=r"GradScaler scales \.grad, and knows nothing of main_grad"):
        optimizer.step()


def test_no_gradient_no_buffer_to_look_at():
    weight = nn.Parameter(torch.ones(4, 3))
    weight.main_grad = torch.zeros(2)  # would be an error where a gradient is made
    with torch.no_grad():
        assert functional.linear(torch.ones(2, 3), weight).shape == (2, 4)


def test_only_tensors_have_buffers():
    with pytest.raises(TypeError, match=r"^MainGradients: parameters has a tuple; expected tensors alone"):
        MainGradients(nn.Linear(2, 3).named_parameters())
