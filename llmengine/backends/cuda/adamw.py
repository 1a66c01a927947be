"""AdamW in CUDA: csrc/cuda/adamw.cu."""

from __future__ import annotations

import torch

from llmengine.backends.buffers import Packed
from llmengine.backends.cuda.native import Native
from llmengine.ops.registry import Kernel, kernel


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def refuses(parameters, gradients, exp_avgs, exp_avg_sqs, *_):
        # of each list the first stands for all: the kernel checks the rest
        lists = (parameters, gradients, exp_avgs, exp_avg_sqs)
        return native.refuses_tensors(*(tensors[0] for tensors in lists if tensors))

    @kernel(table, "adamw", refuses)
    def adamw(
        parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, numbers, lr, multiplier,
        found_inf, beta1, beta2, eps, weight_decay, maximize, stochastic, seed,
    ):  # fmt: skip
        if not parameters:
            return
        on = parameters[0]
        here = lr.device == on.device  # otherwise on the host, where reading it waits for nothing
        with Packed() as packed:
            native.call(
                "adamw", on, parameters=packed(parameters), gradients=[g.contiguous() for g in gradients],
                exp_avgs=packed(exp_avgs), exp_avg_sqs=packed(exp_avg_sqs), max_exp_avg_sqs=packed(max_exp_avg_sqs),
                masters=packed(masters), steps=steps, numbers=numbers, lr=lr if here else None,
                multiplier=multiplier, found_inf=found_inf, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, maximize=maximize, stochastic=stochastic, seed=seed,
                rate=0.0 if here else float(lr), factors=on.new_empty((len(parameters), 4), dtype=torch.int64),
            )  # fmt: skip

    return table
