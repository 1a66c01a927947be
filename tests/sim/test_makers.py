"""Who multiplies, by a file of measured times (llmengine/backends/cuda/makers.py): the quickest at the nearest number
of tokens, with the bits that it has when it is asked for by name; what `explain` says; files of no use."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional
from llmengine.backends import cuda_sim
from llmengine.backends.cuda import makers
from llmengine.backends.cuda.native import products_by
from llmengine.functional.linear import products

from .harness import schedule

TIMES = {  # of forward, of both: sm90a is quickest forward at 8 tokens, cuBLAS at 128; backward sm80
    8: {"blas": (3.0, 9.0), "sm80": (2.0, 5.0), "sm90a": (1.0, 6.0)},
    128: {"blas": (1.0, 9.0), "sm80": (2.0, 5.0), "sm90a": (3.0, 9.5)},
}
SUITE = {maker: peer for peer, maker in makers.PEERS.items()}  # peers by maker, of benchmarks/gpu_suite.py
BENCH = SUITE | {"blas": "llmengine"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def scheduled(request):
    schedule(request)
    makers.forget()


def rows(operator: str, sizes: str, times=TIMES, peers=BENCH, dtype: str = "bf16") -> list[dict]:
    return [
        {"operator": operator, "case": f"{tokens}x{sizes}", "dtype": dtype, "peer": peers[maker], "pass": which}
        | {"ms": ms}
        for tokens, by in times.items()
        for maker, both in by.items()
        for which, ms in zip((makers.FORWARD, makers.BOTH), both, strict=True)
    ]


def written(folder: Path, found: list[dict], **machine) -> str:
    path = folder / "bench.json"
    path.write_text(json.dumps({"machine": {"device": "simulator"} | machine, "rows": found}))
    return str(path)


def layer(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in ((tokens, 40), (72, 40), (40, 72))]


def linear(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return products(x, up)


def ffn(x: Tensor, up: Tensor, down: Tensor, **options) -> Tensor:
    return functional.ffn(x, up, down, **options)


def gated_ffn(x: Tensor, up: Tensor, down: Tensor, **options) -> Tensor:
    return functional.ffn(x, up, down, w_gate=up.flip(0), activation="silu", **options)


def linear_cross_entropy(x: Tensor, head: Tensor, down: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, head, torch.arange(x.shape[0]) % head.shape[0], reduction="none")


def outcome(call, tokens: int, maker: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    leaves = layer(tokens, dtype)
    with llmengine.backend("cuda_sim"), products_by(maker):
        output = call(*leaves)
        return [
            output.detach(),
            *(g for g in torch.autograd.grad(output.float().sum(), leaves, allow_unused=True) if g is not None),
        ]


@pytest.mark.parametrize(
    "call, peers, dtype",
    [(linear, BENCH, "bf16"), (linear, SUITE, "fp16"), (ffn, SUITE, "bf16"), (gated_ffn, BENCH, "fp16")],
)
def test_the_quickest_at_the_nearest_tokens_multiplies(call, peers, dtype: str, tmp_path: Path):
    others = [{"operator": "softmax", "case": "1x2", "peer": "torch"}]
    table = written(tmp_path, [*rows(call.__name__, "40x72", peers=peers, dtype=dtype), *others])
    for tokens, forward in ((5, "sm90a"), (31, "sm90a"), (33, "blas")):
        found, by_forward, by_backward = (outcome(call, tokens, m, DTYPES[dtype]) for m in (table, forward, "sm80"))
        assert torch.equal(found[0], by_forward[0]), tokens
        if call is linear:  # whose backward has nothing of the forward's
            assert all(torch.equal(a, b) for a, b in zip(found[1:], by_backward[1:], strict=True))


@pytest.mark.parametrize("call", [ffn, gated_ffn])
def test_pre_activations_are_made_again_by_whom_the_forward_had_them_from(call, tmp_path: Path):
    table = written(tmp_path, rows(call.__name__, "40x72"))
    for tokens, forward in ((20, "sm90a"), (40, "cuBLAS")):
        again = functools.partial(call, recompute=True)
        kept, made = (outcome(given, tokens, table) for given in (call, again))
        assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True)), tokens
        said = told(again, tokens, table)
        assert f"pre-activations again by {forward} ({call.__name__} forward of bf16" in said
        assert f"; products by sm80 ({call.__name__} backward of bf16" in said


TO_ITSELF = "; what these products end in is not cuBLAS's"


@pytest.mark.parametrize("peers", [BENCH, SUITE])
def test_linear_cross_entropy_is_made_by_the_core_that_was_quicker_or_is_the_devices(peers, tmp_path, monkeypatch):
    times = {8: {"blas": (0.1, 0.2), "sm80": (1.0, 4.0), "sm90a": (2.0, 4.5)}}  # the first is Triton's, or a core's
    table = written(tmp_path, rows("linear_cross_entropy", "40x72", times, peers))
    assert told(linear_cross_entropy, 20, table).splitlines() == [
        "linear_cross_entropy_forward: cuda_sim (products by sm80 (linear_cross_entropy forward of bf16, 40 to 72, at "
        "8 tokens: sm80 1.000 ms, sm90a 2.000 ms))",
        "linear_cross_entropy_backward: cuda_sim (products by sm90a (linear_cross_entropy backward of bf16, 40 to 72, "
        "at 8 tokens: sm90a 2.500 ms, sm80 3.000 ms))",
    ]
    forward, found = (outcome(linear_cross_entropy, 20, maker) for maker in ("sm80", table))
    assert torch.equal(found[0], forward[0])
    other = written(tmp_path, rows("linear", "40x72"))
    makers.forget()
    missing = f"{other} has no linear_cross_entropy forward of bf16, 40 to 72"
    for core, capability in (("sm90a", (9, 0)), ("sm80", (8, 0))):
        monkeypatch.setattr(cuda_sim.NATIVE, "capability", lambda on, found=capability: found)
        for maker, why in ((other, missing), ("blas", "LLMENGINE_CUDA_PRODUCTS=blas")):
            assert f"products by {core} ({why}{TO_ITSELF})" in told(linear_cross_entropy, 20, maker)
        assert f"products by {core} (LLMENGINE_CUDA_PRODUCTS=own)" in told(linear_cross_entropy, 20, "own")


def told(call, tokens: int, maker: str) -> str:
    leaves = layer(tokens)
    with llmengine.backend("cuda_sim"), products_by(maker):
        return llmengine.explain(lambda: call(*leaves).float().sum().backward())


def test_explain_says_who_multiplies_and_why(tmp_path: Path):
    table = written(tmp_path, rows("linear", "40x72"))
    assert told(linear, 20, table).splitlines() == [
        "linear_forward: cuda_sim (products by sm90a (linear forward of bf16, 40 to 72, at 8 tokens: sm90a 1.000 ms, "
        "sm80 2.000 ms, blas 3.000 ms))",
        "linear_backward: cuda_sim (products by sm80 (linear backward of bf16, 40 to 72, at 8 tokens: sm80 3.000 ms, "
        "sm90a 5.000 ms, blas 6.000 ms))",
    ]
    assert f"ffn_forward: cuda_sim (products by cuBLAS ({table} has no ffn forward of bf16, 40 to 72))" in told(
        ffn, 9, table
    )
    assert "(products by sm90a (LLMENGINE_CUDA_PRODUCTS=own))" in told(ffn, 9, "own")
    assert "(products by cuBLAS (LLMENGINE_CUDA_PRODUCTS=blas))" in told(linear, 9, "blas")
    assert "(products by sm80 (the default; no GPU has timed ours yet))" in told(linear, 9, "")


LEFT = "products by sm90a (LLMENGINE_CUDA_PRODUCTS=sm90a); sm80 where TMA cannot fetch "
ODD = "data at an odd address; allowed: multiples of 16 bytes"


def stride(bytes: int) -> str:
    return f"dimension 0 has a stride of {bytes} bytes; allowed: multiples of 16, above 0 and below 2^40"


def test_explain_says_what_tma_cannot_fetch():
    """Of every product of a call."""
    x, weight, target = torch.randn(9, 41).bfloat16()[:, 1:], torch.randn(72, 40).bfloat16(), torch.arange(9)
    odd, up, down = (torch.randn(shape).bfloat16() for shape in ((9, 40), (135, 40), (40, 135)))
    leaves = [t.requires_grad_() for t in (odd, up, down)]
    with llmengine.backend("cuda_sim"), products_by("sm90a"):
        by_product = llmengine.explain(products, x, weight)
        forward, backward = llmengine.explain(lambda: ffn(*leaves).float().sum().backward()).splitlines()
        of_linear = llmengine.explain(lambda: products(odd, up).float().sum().backward()).splitlines()
        loss = llmengine.explain(functional.linear_cross_entropy, x, weight, target)
        narrow = llmengine.explain(products, odd[:, :1], weight[:, :1])
    assert by_product == f"linear_forward: cuda_sim ({LEFT}a (9, 40): {ODD})"
    assert forward == f"ffn_forward: cuda_sim ({LEFT}a (9, 135): {stride(270)})"
    assert backward.startswith(f"ffn_backward: cuda_sim ({LEFT}w_down (40, 135): {stride(270)}, nor a (9, 135): ")
    assert of_linear[0] == f"linear_forward: cuda_sim ({LEFT[: LEFT.index(';')]})"
    assert of_linear[1].startswith(f"linear_backward: cuda_sim ({LEFT}a (9, 135): {stride(270)}")
    assert loss == f"linear_cross_entropy_forward: cuda_sim ({LEFT}input (9, 40): {ODD})"
    assert f"{LEFT}a (9, 1): nothing tells whether a k of 1 lies along its matrices or across them" in narrow


def test_what_a_call_left_to_sm80_is_told_of_no_other():
    x, weight = torch.randn(9, 41).bfloat16()[:, 1:], torch.randn(72, 40).bfloat16()
    with llmengine.backend("cuda_sim"), products_by("sm90a"):
        products(x, weight)
        assert "TMA" not in llmengine.explain(products, x.contiguous(), weight)


def test_gated_blocks_and_float16_are_other_layers(tmp_path: Path):
    table = written(tmp_path, rows("ffn", "40x72"))
    x, up, down = (t.detach() for t in layer(20))
    with llmengine.backend("cuda_sim"), products_by(table):
        gated = llmengine.explain(functional.ffn, x, up, down, w_gate=up)
        half = llmengine.explain(functional.ffn, x.half(), up.half(), down.half())
        wide = llmengine.explain(functional.ffn, x.float(), up.float(), down.float())
    assert "has no gated_ffn forward of bf16, 40 to 72" in gated and "has no ffn forward of fp16, 40 to 72" in half
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
    for call in (linear, ffn, linear_cross_entropy):
        with pytest.raises(FileNotFoundError, match=r"^measured products: .*other\.json cannot be read: No such file"):
            outcome(call, 9, str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"case": "9x40"}, "has the case '9x40'; expected tokens and two sizes, as '8192x4096x16384'"),
        ({"case": "9x40xmany"}, "has the case '9x40xmany'; expected"),
        ({"case": None}, "has the case None; expected"),
        ({"ms": "fast"}, "has 'fast' ms; expected a time"),
        ({"ms": float("nan")}, "has nan ms; expected a time"),
        ({"ms": 0}, "has 0 ms; expected a time"),
        (None, "is a NoneType; expected an object"),
    ],
)
def test_rows_of_no_use_are_errors(change: dict | None, said: str, tmp_path: Path):
    found: list = rows("linear", "40x72")
    found[3] = change if change is None else found[3] | change
    with pytest.raises(ValueError, match=rf"^measured products: .*bench\.json: row 3 {said}"):
        outcome(linear, 9, written(tmp_path, found))


def test_cases_with_options_are_no_layers(tmp_path: Path):
    with_options = [row | {"case": row["case"] + " every feature"} for row in rows("linear", "40x72")]
    assert "has no linear forward" in told(linear, 20, written(tmp_path, with_options))


def test_a_maker_that_failed_or_a_table_without_cublas_decides_nothing(tmp_path: Path):
    alone = {8: {"sm80": (1.0, 2.0), "sm90a": (2.0, 3.0)}}
    failed = [
        {
            "operator": "linear",
            "case": "8x40x72",
            "dtype": "bf16",
            "peer": "llmengine",
            "pass": "forward",
            "error": "no",
        }
    ]
    table = written(tmp_path, rows("linear", "40x72", alone) + failed)
    assert f"products by cuBLAS ({table} has no linear forward" in told(linear, 9, table)
