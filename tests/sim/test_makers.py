"""Who multiplies, by a file of measured times (llmengine/backends/cuda/makers.py): the quickest at the nearest number
of tokens, with the bits that it has when it is asked for by name; what `explain` says; files of no use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends.cuda import makers
from llmengine.backends.cuda.native import products_by
from llmengine.functional.linear import products

from .harness import schedule

TIMES = {  # of forward, of both: sm90a is quickest forward at 64 tokens, cuBLAS at 1024; backward sm80
    64: {"blas": (3.0, 9.0), "sm80": (2.0, 5.0), "sm90a": (1.0, 6.0)},
    1024: {"blas": (1.0, 9.0), "sm80": (2.0, 5.0), "sm90a": (3.0, 9.5)},
}
PEERS = {maker: peer for peer, maker in makers.PEERS.items()}


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)
    makers.forget()


def rows(operator: str, sizes: str, times=TIMES) -> list[dict]:
    return [
        {"operator": operator, "case": f"{tokens}x{sizes}", "dtype": "bf16", "peer": peer, "pass": which, "ms": ms}
        for tokens, by in times.items()
        for maker, both in by.items()
        for peer in [PEERS[maker]]
        for which, ms in zip((makers.FORWARD, makers.BOTH), both, strict=True)
    ]


def written(folder: Path, found: list[dict], **machine) -> str:
    path = folder / "bench.json"
    path.write_text(json.dumps({"machine": {"device": "simulator"} | machine, "rows": found}))
    return str(path)


def layer(tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(s, generator=g).bfloat16().requires_grad_() for s in ((tokens, 40), (72, 40), (40, 72))]


def linear(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return products(x, up)


def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.ffn(x, up, down)


def outcome(call, tokens: int, maker: str) -> list[Tensor]:
    leaves = layer(tokens)
    with llmengine.backend("cuda_sim"), products_by(maker):
        output = call(*leaves)
        return [
            output.detach(),
            *(g for g in torch.autograd.grad(output.float().sum(), leaves, allow_unused=True) if g is not None),
        ]


@pytest.mark.parametrize("call", [linear, ffn])
def test_the_quickest_at_the_nearest_tokens_multiplies(call, tmp_path: Path):
    table = written(tmp_path, [*rows(call.__name__, "40x72"), {"operator": "softmax", "case": "1x2", "peer": "torch"}])
    for tokens, forward in ((20, "sm90a"), (250, "sm90a"), (300, "blas")):
        found, by_forward, by_backward = (outcome(call, tokens, m) for m in (table, forward, "sm80"))
        assert torch.equal(found[0], by_forward[0]), tokens
        if call is linear:  # whose backward has nothing of the forward's
            assert all(torch.equal(a, b) for a, b in zip(found[1:], by_backward[1:], strict=True))


def told(call, tokens: int, maker: str) -> str:
    leaves = layer(tokens)
    with llmengine.backend("cuda_sim"), products_by(maker):
        return llmengine.explain(lambda: call(*leaves).float().sum().backward())


def test_explain_says_who_multiplies_and_why(tmp_path: Path):
    table = written(tmp_path, rows("linear", "40x72"))
    assert told(linear, 20, table).splitlines() == [
        "linear_forward: cuda_sim (products by sm90a (linear forward of bf16, 40 to 72, at 64 tokens: sm90a 1.000 ms, "
        "sm80 2.000 ms, blas 3.000 ms))",
        "linear_backward: cuda_sim (products by sm80 (linear backward of bf16, 40 to 72, at 64 tokens: sm80 3.000 ms, "
        "sm90a 5.000 ms, blas 6.000 ms))",
    ]
    assert f"ffn_forward: cuda_sim (products by cuBLAS ({table} has no ffn forward of bf16, 40 to 72))" in told(
        ffn, 9, table
    )
    assert "(products by sm90a (LLMENGINE_CUDA_PRODUCTS=own))" in told(ffn, 9, "own")
    assert "(products by cuBLAS (LLMENGINE_CUDA_PRODUCTS=blas))" in told(linear, 9, "blas")
    assert "(products by sm80 (the default; no GPU has timed ours yet))" in told(linear, 9, "")


def test_explain_says_what_tma_cannot_fetch():
    x, weight = torch.randn(9, 41).bfloat16()[:, 1:], torch.randn(72, 40).bfloat16()
    with llmengine.backend("cuda_sim"), products_by("sm90a"):
        said = llmengine.explain(products, x, weight)
    assert (
        "products by sm90a (LLMENGINE_CUDA_PRODUCTS=sm90a), but sm80 where TMA cannot fetch: matrix (9, 40): " in said
    )


def test_gated_blocks_and_float16_are_other_layers(tmp_path: Path):
    table = written(tmp_path, rows("ffn", "40x72"))
    x, up, down = (t.detach() for t in layer(20))
    with llmengine.backend("cuda_sim"), products_by(table):
        gated = llmengine.explain(functional.ffn, x, up, down, w_gate=up)
        half = llmengine.explain(functional.ffn, x.half(), up.half(), down.half())
        wide = llmengine.explain(functional.ffn, x.float(), up.float(), down.float())
    assert "has no gated ffn forward of bf16, 40 to 72" in gated and "has no ffn forward of fp16, 40 to 72" in half
    assert "products by cuBLAS (ours are of bfloat16 and float16)" in wide


@pytest.mark.parametrize(
    "found, machine, said",
    [
        ([], {"device": "NVIDIA H100"}, "bench.json was made on 'NVIDIA H100'; here it is 'simulator'"),
        ([], {"products": "sm80"}, "bench.json: its rows 'llmengine' are of products by 'sm80'; expected 'blas'"),
        (None, {}, "bench.json is no bench.json: it has no rows, or no machine"),
    ],
)
def test_files_of_no_use_are_errors(found, machine: dict, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"^measured products: .*{said}"):
        outcome(linear, 9, written(tmp_path, found, **machine))
    with pytest.raises(FileNotFoundError):
        outcome(linear, 9, str(tmp_path / "other.json"))


def test_a_maker_that_failed_or_a_table_without_cublas_decides_nothing(tmp_path: Path):
    alone = {64: {"sm80": (1.0, 2.0), "sm90a": (2.0, 3.0)}}
    failed = [
        {
            "operator": "linear",
            "case": "64x40x72",
            "dtype": "bf16",
            "peer": "llmengine",
            "pass": "forward",
            "error": "no",
        }
    ]
    table = written(tmp_path, rows("linear", "40x72", alone) + failed)
    assert f"products by cuBLAS ({table} has no linear forward" in told(linear, 9, table)
