"""Embedding in CUDA: csrc/cuda/embedding.cu."""

from __future__ import annotations

import torch

from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops.registry import Kernel, kernel

CHUNK = 16  # tokens that a warp adds up: kEmbeddingChunk of csrc/cuda/embedding.h


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(input, weight, scale):
        return native.refuses_tensors(input, weight)

    def backward_refuses(grad_output, input, *_):
        return native.refuses_tensors(grad_output, input)

    @kernel(table, "embedding_forward", forward_refuses)
    def embedding_forward(input, weight, scale):
        output = weight.new_empty((input.shape[0], weight.shape[1]))
        native.call(
            "embedding_forward", weight, input=input.contiguous(), weight=unit_last_stride(weight), scale=scale,
            output=output,
        )  # fmt: skip
        return output

    @kernel(table, "embedding_backward", backward_refuses)
    def embedding_backward(grad_output, input, rows, padding_idx, scale):
        tokens, columns = grad_output.shape
        # of half as many bits: half as many passes; what is no row stays none
        ids, order = input.clamp(-1, rows).to(torch.int32).sort(stable=True)
        grad_weight = grad_output.new_zeros((rows, columns))
        native.call(
            "embedding_backward", grad_output, grad_output=unit_last_stride(grad_output), ids=ids, tokens=order,
            partial=grad_output.new_empty((-(-tokens // CHUNK), 2, columns), dtype=torch.float32),
            padding_idx=padding_idx, scale=scale, grad_weight=grad_weight,
        )  # fmt: skip
        return grad_weight

    return table
