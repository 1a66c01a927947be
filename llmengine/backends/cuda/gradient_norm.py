"""The norm of a list of tensors in CUDA: csrc/cuda/gradient_norm.cu."""

from __future__ import annotations

import torch

from llmengine.backends.cuda.native import Native
from llmengine.ops.registry import Kernel, kernel

CHUNK = 8192  # elements of a block: kNormChunk of csrc/cuda/gradient_norm.h


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def refuses(gradients):
        # the first stands for all: the kernel checks the rest
        return native.refuses_tensors(gradients[0]) if gradients else "no gradients, no device"

    @kernel(table, "gradient_norm", refuses)
    def gradient_norm(gradients):
        chunks = sum(-(-g.numel() // CHUNK) for g in gradients)
        on = gradients[0]
        norm = on.new_empty((), dtype=torch.float32)
        native.call(
            "gradient_norm", on, gradients=[g.contiguous() for g in gradients], norm=norm,
            sums=on.new_empty(chunks, dtype=torch.float64),
        )  # fmt: skip
        return norm

    return table
