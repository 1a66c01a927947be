"""NaN stays NaN, whatever its bits: a kernel that works on the bits of floats must not take those of one for a number.

Wherever the reference, plain PyTorch, has NaN, in results and gradients, kernels have it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine import functional

# The usual one; with its lowest bit; NVIDIA's; all bits set.
BITS = {"7fc00000": 0x7FC00000, "7fc00001": 0x7FC00001, "7fffffff": 0x7FFFFFFF, "ffffffff": -1}
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "relu_squared", "silu"]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), attn_mask=bias).float()


LABELS = torch.tensor([0, 39, 7])
QKVB = ((1, 2, 3, 16), (1, 2, 40, 16), (1, 2, 40, 16), (1, 1, 3, 40))
# name: function, shapes of its arguments, which of them holds a NaN
CASES = {
    "softmax": (lambda x: functional.softmax(x, -1), ((3, 40),), 0),
    "cross_entropy": (lambda x: functional.cross_entropy(x, LABELS, reduction="none"), ((3, 40),), 0),
    "cross_entropy, smooth": (
        lambda x: functional.cross_entropy(x, LABELS, reduction="none", label_smoothing=0.1), ((3, 40),), 0,
    ),
    "linear_cross_entropy": (
        lambda x, w: functional.linear_cross_entropy(x, w, LABELS, reduction="none"), ((3, 24), (40, 24)), 0,
    ),
    "layer_norm": (lambda x, w: functional.layer_norm(x, (40,), w), ((3, 40), (40,)), 0),
    "rms_norm": (lambda x, w: functional.rms_norm(x, (40,), w), ((3, 40), (40,)), 0),
    "attention, query": (attend, QKVB, 0),
    "attention, key": (attend, QKVB, 1),
    "attention, value": (attend, QKVB, 2),
    "attention, bias": (attend, QKVB, 3),
    "attention in bfloat16, bias": (attend_in_bfloat16, QKVB, 3),
    **{
        f"ffn, {name}": (
            lambda x, up, down, name=name: functional.ffn(x, up, down, activation=name),
            ((3, 24), (40, 24), (24, 40)), 0,
        )
        for name in ACTIVATIONS
    },
}  # fmt: skip


def where_nan(case: str, bits: int, backend: str) -> list[Tensor]:
    """Of the result and each gradient."""
    function, shapes, spoilt = CASES[case]
    g = torch.Generator().manual_seed(0)
    arguments = [torch.randn(shape, generator=g) for shape in shapes]
    arguments[spoilt].view(torch.int32).view(-1)[5] = bits
    for argument in arguments:
        argument.requires_grad_()
    with llmengine.backend(backend):
        result = function(*arguments)
        gradients = torch.autograd.grad(result.sum(), arguments)
    return [x.isnan() for x in (result, *gradients)]


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("case", CASES)
def test_nan_stays_nan_whatever_its_bits(case, bits):
    expected = where_nan(case, bits, "reference")
    assert expected[0].any()
    for ours, theirs in zip(where_nan(case, bits, "cpu"), expected, strict=True):
        assert torch.equal(ours, theirs)
