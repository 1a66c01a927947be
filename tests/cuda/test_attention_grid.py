"""The grid on which one pass adds gradients of queries up (csrc/cuda/attention_grid.h), on the host: how fine it is,
and that nothing that is added overflows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
#include <bit>
#include <cstdint>
#include <cstdio>

#include "cuda/attention_grid.h"

int main() {
  using namespace llmengine::cuda::attention;
  char question;
  while (scanf(" %c", &question) == 1) {
    long long a, b, c, d;
    if (scanf("%lld %lld %lld %lld", &a, &b, &c, &d) != 4) return 1;
    const auto number = [](long long bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); };
    if (question == 's') {
      const float steps = steps_of(number(a), b ? int(b) : kGridBits);
      printf("%lld\\n", static_cast<long long>(std::bit_cast<uint32_t>(steps)));
    }
    if (question == 'c') printf("%d\\n", is_too_coarse(number(a), number(b), static_cast<int>(c)));
  }
}
"""
BITS = 29


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    source = tmp_path_factory.mktemp("grid") / "grid.cpp"
    source.write_text(PROGRAM)
    built = source.with_suffix("")
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *options, source, "-o", built], check=True)

    def asked(question: str, *columns: list[int]) -> list[int]:
        rows = zip(*(*columns, *[[0] * len(columns[0])] * (4 - len(columns))), strict=True)
        text = "\n".join(f"{question} {' '.join(map(str, row))}" for row in rows)
        done = subprocess.run([built], input=text, check=True, capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    return asked


def bits(x: Tensor) -> list[int]:
    return x.float().view(torch.int32).long().bitwise_and(0xFFFFFFFF).tolist()


def steps_of(ask, bounds: Tensor, below: int = 0) -> Tensor:
    found = torch.tensor(ask("s", bits(bounds.flatten()), [below] * bounds.numel()), dtype=torch.int64)
    return found.to(torch.int32).view(torch.float32).double().reshape(bounds.shape)


def test_steps_are_the_finest_powers_of_two_that_keep_a_bound_below_2_to_the_29(ask):
    g = torch.Generator().manual_seed(1)
    bounds = torch.cat([torch.rand(4000, generator=g) + 1, torch.tensor([1.0, 2 - 2**-23])])
    bounds = torch.ldexp(bounds, torch.randint(-96, 128, bounds.shape, generator=g))
    steps = steps_of(ask, bounds)
    assert (torch.frexp(steps).mantissa == 0.5).all()
    assert ((steps * bounds < 2**BITS) & (steps * bounds >= 2 ** (BITS - 1))).all()
    least = torch.tensor([2.0**-149, 2.0**-126, 2.0**-100])
    assert (steps_of(ask, least) == 2.0**126).all()  # the largest power whose inverse is a normal number
    strange = torch.tensor([0.0, -1.0, torch.inf, -torch.inf, torch.nan])
    assert not steps_of(ask, strange).any()


@pytest.mark.parametrize("terms", [1, 2, 3, 8, 1000, 2**20])
def test_a_masks_terms_together_stay_below_2_to_the_62(ask, terms: int):
    """As attention_sm90a_grid.cuh asks for steps: 1.21 times the bound each, and half a step."""
    bounds = torch.ldexp(torch.tensor([1.0, 1.5, 2 - 2**-23]), torch.tensor([[-90.0], [-40.0], [0.0], [100.0]]))
    below = 60 - (terms - 1).bit_length()
    steps = steps_of(ask, bounds, below)
    assert ((steps * bounds < 2.0**below) & ((steps * bounds >= 2.0 ** (below - 1)) | (steps == 2.0**126))).all()
    assert (terms * (1.21 * steps * bounds + 0.5) < 2.0**62).all()


# How large queries, keys, values and gradients are, and how many of them are how much larger than the others.
INPUTS = [
    {}, {"key": 1e4}, {"value": 1e4}, {"grad": 1e4}, {"query": 30.0}, {"query": 30.0, "key": 100.0, "value": 1e3},
    {"every": 1e-6}, {"every": 1e-30}, {"key": 1e4, "query": 1e-4}, {"few": 1.0}, {"aligned": 1.0}, {"alike": 1.0},
]  # fmt: skip


def inputs(seed: int, dtype: torch.dtype, dim: int, keys: int, **odd: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(n, dim, generator=g, dtype=torch.float64) for n in (9, keys, keys, 9))
    for name, x in (("query", q), ("key", k), ("value", v), ("grad", grad)):
        if name in odd:
            x[torch.randint(0, len(x), (2,), generator=g)] *= odd[name]
    if "aligned" in odd:  # what Cauchy and Schwarz allow: values along gradients, keys all alike in one column
        v[:] = grad[0] * torch.where(torch.arange(keys) % 2 == 0, 1.0, -1.0)[:, None]
        k[:, 0] = v[:, 0].sign() * k.abs().max()
    if "alike" in odd:
        k[:] = k[0]
    every = odd.get("every", 1.0)
    return [(x * every).to(dtype).double() for x in (q, k, v, grad)]


@pytest.mark.parametrize("odd", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_order_of_parts_overflows(ask, odd: dict[str, float], dtype):
    """Rows' sums of |parts|, which no order of adding them exceeds, as kernels round: G to 16 bits, parts to steps;
    with probabilities 1.21 times as large as they should be, the most that errors of logits make of them."""
    keep = 1 / 0.7
    for seed, (dim, keys) in enumerate([(8, 1), (64, 200), (128, 1500)]):
        q, k, v, grad = inputs(seed, dtype, dim, keys, **odd)
        p = torch.softmax(q @ k.mT * dim**-0.5, -1)
        kept = (torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < 0.7) * keep
        dp = grad @ v.mT * kept
        delta = (p * dp).sum(-1, keepdim=True)
        bound = (keep * grad.norm(dim=-1, keepdim=True) * v.norm(dim=-1).max() + delta.abs()) * k.abs().max()
        steps = steps_of(ask, bound)
        rounded = (1.21 * p * (dp - delta)).to(dtype).double()
        seen = rounded.isfinite().all(-1)  # what overflows float16 is told by its flag
        parts = [(rounded[:, i : i + 128] @ k[i : i + 128] * steps).round().abs() for i in range(0, keys, 128)]
        each = (rounded.abs() @ k.abs() * steps)[seen]
        assert torch.stack(parts)[:, seen].sum(0).max() < 2**31 - 2**22 and each.max() < 2**31 - 2**22


def test_what_is_too_coarse(ask):
    largest, error = (
        torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1e38]),
        torch.tensor([2.0**-8, 2.0**-7, 0.0, 1e-30, 3e38, 3e38]),
    )
    assert ask("c", bits(largest), bits(error), [8] * 6) == [0, 1, 0, 1, 1, 1]
    assert ask("c", bits(largest), bits(error), [11] * 6) == [1, 1, 0, 1, 1, 1]
