"""AdamW, written out from its formula (csrc/ops/adamw.h), a parameter at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.backends.reference.philox import draws
from llmengine.ops.registry import Kernel, kernel

KERNELS: dict[str, Kernel] = {}


@kernel(KERNELS, "adamw")
def adamw(
    parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, numbers, lr, multiplier, found_inf,
    beta1, beta2, eps, weight_decay, maximize, stochastic, seed,
):  # fmt: skip
    if found_inf is not None and found_inf.item():
        return
    rate = float(lr)
    for i, (parameter, m, v, step, number) in enumerate(
        zip(parameters, exp_avgs, exp_avg_sqs, steps, numbers, strict=True)
    ):
        exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        step += 1
        t = int(step)

        def store(to: Tensor, value: Tensor, stream: int, shift: int, row=(t << 32) + number) -> None:
            if stochastic and to.dtype == torch.bfloat16:
                words = draws(seed, stream, torch.tensor(row, device=to.device), to.numel()).view(to.shape)
                value = stochastic_bfloat16(value, words >> shift & 0xFFFF)
            to.copy_(value)

        g = gradients[i].to(exact)
        if multiplier is not None:
            g = g * multiplier
        if maximize:
            g = -g
        mean = torch.lerp(m.to(exact), g, 1 - beta1)
        square = beta2 * v.to(exact) + (1 - beta2) * g * g
        store(m, mean, 0, 16)
        store(v, square, 1, 0)
        if max_exp_avg_sqs:
            square = torch.maximum(max_exp_avg_sqs[i].to(exact), square)
            store(max_exp_avg_sqs[i], square, 1, 16)
        weight = masters[i] if masters else parameter.to(exact)
        direction = mean / (square.sqrt() / (1 - beta2**t) ** 0.5 + eps)
        weight = weight * (1 - rate * weight_decay) - rate / (1 - beta1**t) * direction
        if masters:
            masters[i].copy_(weight)
            parameter.copy_(weight)
        else:
            store(parameter, weight, 0, 0)


def stochastic_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """float32 x, rounded to either neighbour in bfloat16: its bits plus the noise, 16 bits, without the lower half."""
    bits = x.view(torch.int32)
    rounded = ((bits + noise.to(torch.int32)) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
