"""Cross-entropy of a linear layer in CUDA, of bfloat16 and float16: csrc/cuda/linear_cross_entropy.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.backends.buffers import destinations, empty_gradients
from llmengine.backends.cuda.cross_entropy import class_weights
from llmengine.backends.cuda.linear_cross_entropy_at_once import loss_with_gradients
from llmengine.backends.cuda.native import Native, parameter, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

# Tokens, and classes, of a tile of csrc/cuda/gemm_sm80.cuh. Those of gemm_sm90a.cuh are two by two of them: spans and
# blocks that are whole tiles here need not be there.
TILE = 128
# Spans, of a tile of tokens each, for each of the two blocks that a multiprocessor runs at once: more of them end at
# more nearly the same time, and each costs 12 bytes a token. On Hopper's core, for each cluster of two multiprocessors,
# which takes one at a time, twice as many.
WAVES = 4
# Elements of the backward's block of gradients: a 96th of the logits, a third of a percent of what the unfused path
# has; but 16 MiB at least, for products to have work, and at most 64, where sums' ways to memory are short enough.
SHARE, BLOCK = 96, (2**23, 2**25)
# Tokens of a block, at most: each block of classes reads and writes the input's gradient once more, and each of its
# blocks of tokens its part of the weight's. Of T tokens and K classes that is as 1 / K + 1 / T: they should be alike.
TOKENS = 4096


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(input, linear_weight, linear_bias, target, weight, *_):
        if reason := native.refuses_tensors(input, linear_weight, linear_bias, target, weight):
            return reason
        if input.dtype == torch.float32:
            return f"the {native.backend} linear_cross_entropy multiplies bfloat16 and float16, got float32"
        return native.refuses_products(input)

    def backward_refuses(grad_loss, *given):
        return native.refuses_tensors(grad_loss, given[0]) or forward_refuses(*given)

    @kernel(table, "linear_cross_entropy_forward", forward_refuses)
    def linear_cross_entropy_forward(
        input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
    ):
        tokens = input.shape[0]
        losses, lse, target_logits = (input.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        loss = losses if reduction == "none" else losses.new_empty(())
        normaliser = losses.new_empty(())
        native.call(
            "linear_cross_entropy_forward", input,
            **_arguments(input, linear_weight, linear_bias, target, weight, label_smoothing), reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, losses=losses,
            lse=lse, loss=None if reduction == "none" else loss, normaliser=normaliser,
            partial=room_of_spans(input, linear_weight), target_logits=target_logits,
            core=native.core_alone("linear_cross_entropy", input, linear_weight),
        )  # fmt: skip
        return loss, lse, normaliser

    def room_of_spans(input, linear_weight):
        tokens = input.shape[0]
        spans = spans_of(tokens, linear_weight.shape[0], native.multiprocessors(input))
        return input.new_empty(spans, 3, tokens, dtype=torch.float32)

    @kernel(table, "linear_cross_entropy_shard_forward", forward_refuses)
    def linear_cross_entropy_shard_forward(
        input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, softcap
    ):
        tokens = input.shape[0]
        statistics = input.new_empty(4, tokens, dtype=torch.float32)
        native.call(
            "linear_cross_entropy_shard_forward", input,
            **_arguments(input, linear_weight, linear_bias, target, weight, label_smoothing), ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap, statistics=statistics,
            partial=room_of_spans(input, linear_weight), target_logits=statistics.new_zeros(tokens),
            core=native.core_alone("linear_cross_entropy", input, linear_weight),
        )  # fmt: skip
        return statistics

    @kernel(table, "linear_cross_entropy_backward", backward_refuses)
    def linear_cross_entropy_backward(
        grad_loss, input, linear_weight, linear_bias, target, weight, lse, normaliser, reduction, ignore_index,
        label_smoothing, z_loss, softcap, _gradient_filter, main, wanted,
    ):  # fmt: skip
        return gradients_of(
            "linear_cross_entropy_backward", input, linear_weight, main, wanted,
            **_arguments(input, linear_weight, linear_bias, target, weight, label_smoothing), grad_loss=grad_loss,
            lse=lse, normaliser=normaliser, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip

    @kernel(table, "linear_cross_entropy_shard_backward", forward_refuses)
    def linear_cross_entropy_shard_backward(
        input, linear_weight, linear_bias, target, weight, lse, factors, ignore_index, label_smoothing, softcap, main,
        wanted,
    ):  # fmt: skip
        return gradients_of(
            "linear_cross_entropy_shard_backward", input, linear_weight, main, wanted,
            **_arguments(input, linear_weight, linear_bias, target, weight, label_smoothing),
            lse=lse, factors=factors, ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip

    def gradients_of(name, x, head, main, wanted, **arguments):
        (tokens, d), classes, wide = x.shape, head.shape[0], torch.float32
        gradients = empty_gradients(
            x, ((x.shape, x.dtype), (head.shape, head.dtype), ((classes,), wide)), wanted, {1: main}
        )
        if not any(wanted):
            return gradients
        rows, columns = block_of(tokens, classes)
        grad_input, grad_weight, grad_bias = destinations(gradients, wanted, {1: main})
        in_parts = wanted[1] and rows < tokens and main is None and head.dtype != wide

        def low(lines: int, needed: bool) -> Tensor | None:
            return x.new_empty(lines, d, dtype=torch.uint8) if needed else None

        native.call(
            name, x, **arguments, sums=None, grad_input=grad_input, grad_linear_weight=grad_weight,
            grad_linear_bias=grad_bias, add_linear_weight=main is not None, block=x.new_empty(rows, columns),
            partial_bias=x.new_empty(2 * -(-tokens // TILE), columns, dtype=wide) if wanted[2] else None,
            low_input=low(tokens, wanted[0] and columns < classes), low_weight=low(columns, in_parts),
            **products_of(x, head, min(rows, columns) * d),
        )  # fmt: skip
        return gradients

    def products_of(x, head, elements):
        """Without room for sums of parts of k where every product has tiles enough for it to stay whole."""
        core = native.core_alone("linear_cross_entropy", x, head, backward=True)
        if elements > native.multiprocessors(x) * TILE * TILE:
            return {"core": core, "room": None}
        return native.products(x, core)

    @kernel(table, "linear_cross_entropy_with_gradients", forward_refuses)
    def linear_cross_entropy_with_gradients(input, linear_weight, linear_bias, target, weight, *options):
        """In two passes over the logits where they are not formed once: of no tokens, and where a weight's gradient
        would be rounded for each of several blocks."""
        *given, block_tokens, wide, wanted = options
        tensors = (input, linear_weight, linear_bias, target, weight)
        rounded = wanted[1] and linear_weight.dtype != torch.float32 and not wide
        if 0 < input.shape[0] and (block_tokens >= input.shape[0] or not rounded):
            return loss_with_gradients(native, *tensors, *options)
        loss, lse, normaliser = linear_cross_entropy_forward(*tensors, *given)
        gradients = linear_cross_entropy_backward(
            torch.ones_like(loss), *tensors, lse, normaliser, *given, 0.0, None, wanted
        )
        return loss, *(g.float() if wide else g for g in gradients)

    return table


def spans_of(tokens: int, classes: int, multiprocessors: int) -> int:
    """Into how many spans of whole tiles the classes are cut, each a block for every tile of tokens."""
    tiles = max(-(-classes // TILE), 1)
    wanted = min(-(-2 * WAVES * multiprocessors // max(-(-tokens // TILE), 1)), tiles)
    return -(-tiles // -(-tiles // wanted))


def block_of(tokens: int, classes: int) -> tuple[int, int]:
    """How many tokens' and classes' gradients of logits the backward holds: whole tiles, or all tokens."""
    wanted = min(max(tokens * classes // SHARE, BLOCK[0]), BLOCK[1])
    elements, rows = 1 << wanted.bit_length() - 1, min(max(tokens, 1), TOKENS)
    return min(tokens, rows), min(elements // rows, max(classes, 1) + TILE - 1) // TILE * TILE


def _arguments(input, linear_weight, linear_bias, target, weight, label_smoothing):
    """What forward and backward share; products are taken in the precision of input."""
    return class_weights(weight, label_smoothing) | {
        "input": unit_last_stride(input),
        "linear_weight": unit_last_stride(linear_weight.to(input.dtype)),
        "linear_bias": parameter(linear_bias, input),
        "target": target.contiguous(),
    }
