"""Cross-entropy of a linear layer's logits, which need not be held whole: schemas, fake kernels, autograd.

Kernels see `input` as (tokens, d), `linear_weight` as (classes, d), `target` as int64 (tokens,). The forward keeps one
log-sum-exp a token; the backward forms the logits again, block by block. On CPUs, where a loss of all tokens is wanted
with its gradients, and on GPUs, where the caller has memory for it, both are made at once, from logits formed once
(Hsu et al. 2024, Liger Kernel). What holds for targets, losses and statistics in ops/cross_entropy.py holds here; what
for dtypes of parameters in ops/ffn.py.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from llmengine.backends.buffers import empty_gradients
from llmengine.backends.cpu.linear import TILES
from llmengine.ops.norm import statistics_dtype
from llmengine.ops.registry import define, demanded, load


def _forward_fake(input, linear_weight, linear_bias, target, weight, reduction, *options):
    lse = input.new_empty(input.shape[0], dtype=statistics_dtype(input))
    return lse.new_empty(lse.shape if reduction == "none" else ()), lse, lse.new_empty(())


def _gradients_fake(input, linear_weight, wanted, main=None, wide=False):
    gradients = (
        (input.shape, statistics_dtype(input) if wide else input.dtype),
        (linear_weight.shape, statistics_dtype(linear_weight) if wide else linear_weight.dtype),
        (linear_weight.shape[:1], statistics_dtype(input)),
    )
    return empty_gradients(input, gradients, wanted, {1: main})


def _backward_fake(grad_loss, input, linear_weight, *others):
    return _gradients_fake(input, linear_weight, others[-1], others[-2])


def _with_gradients_fake(input, linear_weight, *others):
    *_, wide, wanted = others
    loss = input.new_empty((), dtype=statistics_dtype(input))
    return loss, *_gradients_fake(input, linear_weight, wanted, wide=wide)


# lse: each token's log-sum-exp, 0 where it is ignored. normaliser: what the sum was divided by: for "mean" the sum of
# the targets' weights (the count of labels without weights), otherwise 1.
linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? weight, str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap)"
    " -> (Tensor loss, Tensor lse, Tensor normaliser)",
    _forward_fake,
)
# grad_loss: (tokens,) for "none", otherwise (). wanted: a flag for each gradient; the others come back empty, and so
# does linear_weight's where there is a buffer for it, `main` (optim/main_grad.py).
# gradient_filter: logits' gradients that are nowhere beyond it, before the loss was reduced, may be left out, a tile of
# tokens and classes at a time: a backend that leaves out none keeps the contract.
linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, Tensor lse, Tensor normaliser, str reduction, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, float gradient_filter, Tensor(a!)? main, bool[] wanted)"
    " -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
    _backward_fake,
)
# The loss, for "mean" or "sum" and on CPUs without a softcap, and the gradients of exactly it. block_tokens: how many
# tokens to take at a time, with memory for the logits of all their classes. wide: gradients of an input
# or linear_weight of 16 bits in float32, for a factor and a sum that are still to come.
linear_cross_entropy_with_gradients = define(
    "linear_cross_entropy_with_gradients(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    " Tensor? weight, str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " SymInt block_tokens, bool wide, bool[] wanted)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)",
    _with_gradients_fake,
)
BLOCK_BYTES = 100 << 20
"""What the tokens that are taken at a time may take on a CPU, with all their classes: 1024 of GPT-2's in 16 bits."""
GPU_BYTES, GPU_STEP = 2 << 30, 1024
"""The same on a GPU, and by how many tokens: 8192 of 128256 classes. Each further block costs a float32 gradient of
the weight's way to memory and back: of 2048 tokens a seventh of the products' time at 3.35 TB/s and 750 Tflop/s."""
CLASS_BLOCK = 1536
"""A row of the block takes whole multiples of so many classes (csrc/ops/linear_cross_entropy.h)."""
FEWEST_TOKENS, TOKEN_STEP = 96, 32
"""Fewer tokens at a time would leave the products waiting for the weight; products take so many rows at a time."""


def is_wide(input, main) -> bool:
    """Whether gradients that are made with the loss wait for its own in float32: a buffer's, which are not rounded, and
    float16's, whose losses are scaled to keep gradients from vanishing, here after they were made."""
    return main is not None or input.dtype == torch.float16


def block_tokens(input, linear_weight, main=None, wanted: bool = True) -> int:
    """How many tokens to take at a time, so that blocks fit what they may take, on a CPU as good as equal; 0: too few
    would fit for gradients to be made with the loss. wanted: linear_weight's."""
    tokens, classes = input.shape[0], max(linear_weight.shape[0], 1)
    on_gpu = input.device.type == "cuda"
    room, multiple = (GPU_BYTES, 8) if on_gpu else (BLOCK_BYTES, CLASS_BLOCK)
    fitting = room // (-(-classes // multiple) * multiple * input.element_size())
    if fitting >= tokens:
        return max(tokens, 1)
    rounded = wanted and linear_weight.dtype != torch.float32 and not is_wide(input, main)  # once a block
    if fitting < FEWEST_TOKENS or rounded:
        return 0
    if on_gpu:
        return fitting // GPU_STEP * GPU_STEP
    blocks = -(-tokens // (fitting // TOKEN_STEP * TOKEN_STEP))
    return -(-tokens // (blocks * TOKEN_STEP)) * TOKEN_STEP


def at_once(input, linear_weight, reduction, softcap, recompute=True, main=None) -> bool:
    """Whether loss and gradients are made together: on a GPU where that was asked for and our CUDA kernels run, on a
    CPU where it is quicker. There float16's are not, nor those of a buffer (see is_wide), nor bfloat16's on AMX, which
    forms logits again sooner than memory brings them.
    """
    sizes = input, linear_weight, main, linear_weight.requires_grad
    if input.device.type == "cuda":
        asked_for = not recompute and reduction != "none" and input.dtype in (torch.bfloat16, torch.float16)
        ours = demanded() in (None, "cuda") and load("cuda").unavailable is None
        return asked_for and ours and block_tokens(*sizes) > 0
    return (
        input.device.type == "cpu"
        and not (TILES and input.dtype == torch.bfloat16)
        and input.dtype in (torch.float32, torch.bfloat16)
        and main is None
        and reduction != "none"
        and softcap == 0
        and block_tokens(*sizes) > 0
    )


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy(input): -> loss. Class weights are constants, as in PyTorch. The last options are the
    gradient filter and the buffer for linear_weight's gradient, of which the forward knows nothing."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, *options):
        loss, lse, normaliser = linear_cross_entropy_forward(
            input, linear_weight, linear_bias, target, weight, *options[:-2]
        )
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, lse, normaliser)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        wanted, saved = list(ctx.needs_input_grad[:3]), ctx.saved_tensors  # read once: checkpoints allow no more
        grad_input, grad_weight, grad_bias = linear_cross_entropy_backward(grad_loss, *saved, *ctx.options, wanted)
        return (
            grad_input if wanted[0] else None,
            grad_weight if wanted[1] and ctx.options[-1] is None else None,
            grad_bias.to(saved[2].dtype) if wanted[2] else None,
            *(None,) * (2 + len(ctx.options)),
        )


class LinearCrossEntropyAtOnce(torch.autograd.Function):
    """The same where `at_once` holds. The last option is the buffer for linear_weight's gradient."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, *options):
        *given, main = options
        ctx.wanted, ctx.main = list(ctx.needs_input_grad[:3]), main
        block = block_tokens(input, linear_weight, main, ctx.wanted[1])
        loss, *gradients = linear_cross_entropy_with_gradients(
            input, linear_weight, linear_bias, target, weight, *given, block, is_wide(input, main), ctx.wanted
        )
        ctx.save_for_backward(*gradients)
        ctx.constants = 2 + len(options)
        ctx.dtypes = [None if t is None else t.dtype for t in (input, linear_weight, linear_bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        wanted, saved = list(ctx.wanted), ctx.saved_tensors
        if ctx.main is not None:
            ctx.main.addcmul_(saved[1], grad_loss.reshape(1))
            wanted[1] = False
        gradients = (
            _times(gradient, grad_loss, dtype) if want else None
            for gradient, dtype, want in zip(saved, ctx.dtypes, wanted, strict=True)
        )
        return *gradients, *(None,) * ctx.constants


def _times(gradient, factor, dtype):
    """gradient * factor in `dtype`, rounded once: in place where the graph is not kept for another backward (hooks that
    pack saved tensors should copy them); on a CPU, where nothing waits for the factor, unread if that is 1.

    The factor has a dimension: one of none would be rounded to the gradient's dtype on a GPU."""
    factor = factor.reshape(1)
    if torch.compiler.is_compiling() or type(factor) is not torch.Tensor:
        return (gradient * factor).to(dtype)
    if factor.is_cpu and factor.item() == 1 and not _graph_is_kept():
        return gradient.to(dtype)
    in_place = gradient.dtype == dtype and not _graph_is_kept()
    return torch.mul(gradient, factor, out=gradient if in_place else torch.empty_like(gradient, dtype=dtype))


def _graph_is_kept() -> bool:
    """Whether the backward that runs was asked to keep its graph; so it is taken to be where PyTorch does not tell."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
