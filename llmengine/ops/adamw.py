"""One step of AdamW over a list of parameters, in place: schema and fake kernel. Semantics: csrc/ops/adamw.h.

All parameters of a call have one dtype and device; so have all moments. Masters and largest moments come for all or for
none. lr, multiplier and found_inf are scalars, lr on the CPU or with the parameters. Autograd has no part in it, but
tensors that a backward pass still needs are marked as changed.
"""

from __future__ import annotations

import torch

from llmengine.ops.registry import define

_node = define(
    "adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor(f!)[] steps, int[] numbers, Tensor lr,"
    " Tensor? multiplier, Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay, bool maximize,"
    " bool stochastic, int seed) -> ()",
    lambda *_: None,
)


def adamw(parameters, *args) -> None:
    _node(parameters, *args)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(parameters)
