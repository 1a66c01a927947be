"""The memory of linear cross-entropy in CUDA, counted to the byte on tensors without any, at the sizes of language
models' heads: what the Python side allocates is all there is, since kernels allocate nothing."""

from __future__ import annotations

import pytest
import torch

from llmengine.backends.cuda import linear_cross_entropy
from llmengine.backends.cuda.native import Native
from llmengine.testing.memory import Peak

OPTIONS = ("mean", -100, 0.0, 0.0, 0.0)
MULTIPROCESSORS = 132


class H100(Native):
    """One whose kernels do nothing."""

    def __init__(self):
        super().__init__("llmengine._cuda", "cuda", "cuda", "")

    def call(self, kernel, on, **arguments):
        pass

    def core_of(self, operator, x, *weights, backward=False):
        return "sm90a"

    def multiprocessors(self, on):
        return MULTIPROCESSORS


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_and_backward(tokens: int, d: int, classes: int, weight=torch.bfloat16, main=None) -> int:
    """What is held beyond the gradients."""
    table = linear_cross_entropy.kernels(H100())
    x, w, target = empty(tokens, d), empty(classes, d, dtype=weight), empty(tokens, dtype=torch.int64)
    peak = Peak(x, w, target, *([] if main is None else [main]))
    with peak:
        tensors = (x, w, None, target, None)
        loss, lse, normaliser = table["linear_cross_entropy_forward"].run(*tensors, *OPTIONS)
        gradients = table["linear_cross_entropy_backward"].run(
            loss, *tensors, lse, normaliser, *OPTIONS, 0.0, main, [True, True, False]
        )
    return peak.most - sum(g.nbytes for g in gradients)


def unfused(tokens: int, classes: int) -> int:
    """Logits in 16 bits, their softmax and their gradient."""
    return 3 * 2 * tokens * classes


# the block's tokens and classes, and what share of the unfused path's memory it is at most
HEADS = [
    (8192, 4096, 128256, 4096, 2048, 0.0095),
    (8192, 2304, 256000, 4096, 4096, 0.005),
    (65536, 768, 50304, 4096, 8192, 0.0065),
]


@pytest.mark.parametrize("tokens, d, classes, rows, columns, share", HEADS)
def test_bytes_beyond_the_gradients(tokens: int, d: int, classes: int, rows: int, columns: int, share: float):
    """The block of gradients of logits, a byte beside each element of the input's gradient and of a block's of the
    weight, each token's log-sum-exp, and two numbers."""
    held = forward_and_backward(tokens, d, classes)
    assert held == 2 * rows * columns + tokens * d + columns * d + 4 * tokens + 8
    assert held < share * unfused(tokens, classes)


def test_a_buffer_for_the_weights_gradient_takes_none_beside_it():
    held = forward_and_backward(8192, 4096, 128256, main=empty(128256, 4096, dtype=torch.float32))
    assert held == 2 * 4096 * 2048 + 8192 * 4096 + 4 * 8192 + 8


def test_memory_does_not_grow_with_tokens_times_classes():
    small, large = (forward_and_backward(tokens, 64, 32768) for tokens in (131072, 524288))
    per_token = 64 + 4  # bytes: beside the input's gradient, log-sum-exp
    assert large - small == per_token * (524288 - 131072) and large < 0.002 * unfused(524288, 32768)


@pytest.mark.parametrize("tokens, parts", [(256, 1), (8, 1), (8192, 0)])
def test_room_for_parts_of_k_where_a_product_has_few_tiles(tokens: int, parts: int):
    rows, columns = linear_cross_entropy.block_of(tokens, 128256)
    held = forward_and_backward(tokens, 4096, 128256)
    low = 4096 * (tokens * (columns < 128256) + columns * (rows < tokens))
    known = 2 * rows * columns + low + 4 * tokens + 8
    assert held - known == parts * 4 * 2 * MULTIPROCESSORS * 128 * 128


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
def test_gradients_at_once_hold_one_block_of_logits(weight):
    tokens, d, classes = 4096, 512, 128256
    run = linear_cross_entropy.kernels(H100())["linear_cross_entropy_with_gradients"].run
    x, w, target = empty(tokens, d), empty(classes, d, dtype=weight), empty(tokens, dtype=torch.int64)
    for at_once in (4096, 1024) if weight == torch.float32 else (4096,):
        with Peak(x, w, target) as peak:
            _, *gradients = run(x, w, None, target, None, *OPTIONS, at_once, False, [True, True, False])
        held = peak.most - sum(g.nbytes for g in gradients)
        narrow = 2 * classes * d if weight == torch.float32 else 0  # the weight as products take it
        rest = held - 2 * at_once * classes - narrow  # room for parts of k, and numbers of tokens
        assert 0 < rest <= 4 * 2 * MULTIPROCESSORS * 128 * 128 + 64 * tokens


def test_wide_gradients_at_once_hold_no_more_than_themselves():
    tokens, d, classes = 4096, 512, 128256
    run = linear_cross_entropy.kernels(H100())["linear_cross_entropy_with_gradients"].run
    for dtype in (torch.bfloat16, torch.float16):
        x, w, target = empty(tokens, d, dtype=dtype), empty(classes, d, dtype=dtype), empty(tokens, dtype=torch.int64)
        with Peak(x, w, target) as peak:
            _, *gradients = run(x, w, None, target, None, *OPTIONS, 1024, True, [True, True, False])
        assert sum(g.nbytes for g in gradients) == 4 * (tokens + classes) * d
        rest = peak.most - sum(g.nbytes for g in gradients) - 2 * 1024 * classes
        assert 0 < rest <= 4 * 2 * MULTIPROCESSORS * 128 * 128 + 64 * tokens
