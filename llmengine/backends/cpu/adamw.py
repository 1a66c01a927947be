"""AdamW on the CPU: csrc/cpu/kernels/adamw.cpp."""

from __future__ import annotations

from llmengine.backends.buffers import Packed
from llmengine.backends.cpu.native import module, refuses_tensors
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


def _refuses(parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, numbers, lr, *_):
    # of each list the first stands for all: the kernel checks the rest
    return refuses_tensors(*(tensors[0] for tensors in (parameters, gradients, exp_avgs, exp_avg_sqs) if tensors))


@kernel(KERNELS, "adamw", _refuses)
def adamw(
    parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, numbers, lr, multiplier, found_inf,
    beta1, beta2, eps, weight_decay, maximize, stochastic, seed,
):  # fmt: skip
    with Packed() as packed:
        module.adamw(
            parameters=packed(parameters), gradients=[g.contiguous() for g in gradients], exp_avgs=packed(exp_avgs),
            exp_avg_sqs=packed(exp_avg_sqs), max_exp_avg_sqs=packed(max_exp_avg_sqs), masters=packed(masters),
            steps=steps, numbers=numbers, lr=lr, multiplier=multiplier, found_inf=found_inf, beta1=beta1, beta2=beta2,
            eps=eps, weight_decay=weight_decay, maximize=maximize, stochastic=stochastic, seed=seed,
        )  # fmt: skip
