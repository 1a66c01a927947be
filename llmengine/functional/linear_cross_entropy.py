"""Cross-entropy of a linear layer's logits, which need not be held whole."""

from __future__ import annotations

from torch import Tensor

from llmengine.functional.arguments import (
    autocast,
    check_float,
    check_probability,
    check_same_device,
    main_grad,
    needs_grad,
    parameter_like,
)
from llmengine.functional.cross_entropy import (
    check_num_items,
    check_options,
    check_targets,
    check_weight,
    divide,
)
from llmengine.functional.linear_cross_entropy_shard import VocabularyShard
from llmengine.ops import linear_cross_entropy as ops
from llmengine.ops.linear_cross_entropy_shard import LinearCrossEntropyShard, sharded_loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    gradient_filter: float = 0.0,
    recompute: bool = True,
    num_items: Tensor | float | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, ...), whose logits need not be held whole.

    The formula, its options and the dtype of the result are those of `llmengine.functional.cross_entropy`; names and
    order are those of `torch.nn.functional.linear_cross_entropy`. Tokens of class ignore_index (None: -100) are left
    out before any product on CPUs; elsewhere zeros multiply them, so that they must be finite. Extra memory is a few
    blocks of fixed size and, in the backward, at most one float32 copy of the input's gradient; the backward computes
    the logits again from each token's saved log-sum-exp. On CPUs a mean or sum that needs gradients makes them at once
    instead (but for bfloat16 on AMX), with a block of at most 100 MiB: the backward then only scales them.

    recompute: memory or speed, on GPUs. Recomputed logits are never in memory, for 8 tokens d C operations forward and
    backward. Else a mean or sum of 16 bits by our CUDA kernels makes its gradients at once, for 6, of logits that are
    held in up to 2 GiB: those of all tokens, or, where linear_weight is frozen or its gradient is summed in float32, of
    some after the others; the backward then scales them, and gradient_filter leaves out nothing. In float16, and where
    linear_weight has a buffer for its gradient (`main_grad`), gradients are held in float32 until then. What does not
    fit, and shards, are recomputed.

    num_items: what "mean" and "sum" divide the sum of the losses by, where this call has a part of a step's tokens
    (gradient accumulation, data-parallel processes): the count of the whole step's labels. Then loss = sum over this
    call's tokens / num_items, and losses and gradients of the parts add up to the step's mean.

    gradient_filter (Cut Cross-Entropy, Wijmans et al. 2024; below 1, 0: off): gradients may leave out a tile of tokens
    and classes in which no token's loss, before its reduction, changes with any class's logit by more than this. Where
    most classes are improbable, most tiles are such, and two of the backward's three products pass over them: in
    Triton; other backends leave out nothing. With 2**-12 a gradient of bfloat16 logits loses what it mostly rounds
    away; rare classes learn less from many small terms, so train from scratch without.

    shard: this process holds some of the classes, other processes the others (`VocabularyShard`): linear_weight and
    linear_bias are of its own, but target, weight and ignore_index of all. Every process gives the same input, target,
    weight and options, and gets the same loss; of input it gets the whole gradient, summed over the processes, unless
    the shard says otherwise. gradient_filter then leaves out nothing.

    Shapes: input (*, d), linear_weight (C, d), linear_bias and weight (C,), target (*) of class indices; the result is
    () or, for reduction "none", like target. linear_weight and linear_bias are in input's dtype, or float32 beside a
    16-bit input (as under autocast, which casts input alone): products are then taken in input's precision, and
    gradients come back in each parameter's dtype.

    Differences from PyTorch: a mean over no labels is 0 with zero gradients; targets are indices alone, and the
    linear layer has one class dimension. Raises ValueError on shapes, dtypes, devices or options that do not fit, and
    on the CPU for a target out of range.
    """
    op = "linear_cross_entropy"
    check_float(op, "input", input)
    check_options(op, reduction, label_smoothing, z_loss, softcap)
    check_num_items(op, num_items, reduction)
    check_probability(op, "gradient_filter", gradient_filter)
    if input.ndim == 0:
        raise ValueError(f"{op}: input has shape (); expected (*, d)")
    check_float(op, "linear_weight", linear_weight)
    if linear_weight.ndim != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{op}: linear_weight has shape {tuple(linear_weight.shape)}; expected (classes, {input.shape[-1]})"
        )
    if shard is not None and not isinstance(shard, VocabularyShard):
        raise TypeError(f"{op}: shard is a {type(shard).__name__}; expected a VocabularyShard or None")
    (rows, d), classes = linear_weight.shape, linear_weight.shape[0] if shard is None else shard.classes
    if shard is not None and not 0 <= shard.first <= shard.first + rows <= classes:
        raise ValueError(
            f"{op}: shard has classes {shard.first} to {shard.first + rows}, by linear_weight's {rows} rows; expected "
            f"them among 0 to {classes}"
        )
    if shard is not None and shard.reduce is None and rows != classes:
        raise ValueError(f"{op}: shard has {rows} of {classes} classes and no reduce; who puts the shards together?")
    expected = input.shape[:-1]
    target = check_targets(op, target, expected, -100 if ignore_index is None else ignore_index)
    (x,) = autocast(input)
    check_weight(op, weight, classes, x)
    linear_weight = parameter_like(op, "linear_weight", linear_weight, (rows, d), x)
    linear_bias = parameter_like(op, "linear_bias", linear_bias, (rows,), x)
    check_same_device(
        op, input=input, linear_weight=linear_weight, linear_bias=linear_bias, target=target, weight=weight
    )
    if classes == 0 and target.numel():
        raise ValueError(f"{op}: linear_weight of shape {(classes, d)} has no classes")
    tensors = (
        x.reshape(expected.numel(), d), linear_weight, linear_bias, target.reshape(-1),
        None if weight is None else weight.detach(),
    )  # fmt: skip
    reduction = reduction if num_items is None else "sum"
    options = (
        reduction, -100 if ignore_index is None else int(ignore_index), float(label_smoothing), float(z_loss),
        float(softcap),
    )  # fmt: skip
    gradients, main = needs_grad(*tensors[:3]), main_grad(op, "linear_weight", linear_weight)
    if shard is not None:
        args = (*tensors, shard, *options)
        loss = LinearCrossEntropyShard.apply(*args, main) if gradients else sharded_loss(*args)[0]
    elif not gradients:
        loss = ops.linear_cross_entropy_forward(*tensors, *options)[0]
    elif ops.at_once(*tensors[:2], reduction, softcap, recompute, main):
        loss = ops.LinearCrossEntropyAtOnce.apply(*tensors, *options, main)
    else:
        loss = ops.LinearCrossEntropy.apply(*tensors, *options, float(gradient_filter), main)
    if num_items is not None:
        return divide(loss, num_items)
    return loss.view(expected) if reduction == "none" else loss
