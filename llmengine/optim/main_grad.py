"""Gradients in float32 whatever the parameters are: many micro-batches to a step, without a rounding for each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class MainGradients:
    """A float32 buffer for the gradient of each parameter, its `main_grad` (Megatron-LM's name), which all gather in.

        mains = MainGradients(model.parameters())
        for micro_batch in micro_batches:
            model(**micro_batch).loss.backward()
        norm = gradient_norm(mains.gradients())
        optimizer.step(gradient_scale=(limit / norm).clamp(max=1.0))      # llmengine.optim.AdamW
        optimizer.zero_grad()                                             # fills them with zeros

    `.grad` of a bfloat16 weight is rounded once for each micro-batch, and costs a pass that reads and writes it. With a
    buffer, `functional.linear`, `ffn`, `fp8_linear` and `linear_cross_entropy`, and so the modules and models that call
    them, let the product that makes a weight's gradient add its float32 sums to the buffer; the weight gets no `.grad`
    from it. All other gradients (of biases, norms, embeddings, of layers that PyTorch multiplies, of weights that had
    hooks of their own, by register_hook, when they were multiplied) become a `.grad` in the parameter's dtype, as
    always, which a hook adds to the buffer as soon as it is there. After a backward every
    parameter's `.grad` is None, and what used to read it reads `main_grad`.

    parameters: those that take no gradient are passed over, and a `.grad` that is there joins its buffer. Make the
    buffers when the model is where it will be trained; remove() them before it is pickled. A parameter that no loss has
    reached has a gradient of zeros (with `.grad` it has none), unless it is frozen. torch.autograd.grad of such a loss
    adds to the buffers, too, and returns no gradient of those weights. Under torch.compile all gradients go by the
    hook. Across processes `training.distributed.sum_gradients` sums the buffers, once a step. DistributedDataParallel,
    FSDP and torch.amp.GradScaler know nothing of them: under DistributedDataParallel, run all micro-batches in its
    no_sync(). Where it does sum, it leaves a `.grad`, and the step refuses to guess; with a GradScaler it refuses, too.
    Raises TypeError where something is not a tensor, ValueError where a parameter already has a buffer, or is no leaf
    of a real floating dtype.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        given = list(dict.fromkeys(parameters))
        if others := [p for p in given if not isinstance(p, Tensor)]:
            raise TypeError(f"MainGradients: parameters has a {type(others[0]).__name__}; expected tensors alone")
        self._parameters = [p for p in given if p.requires_grad]
        for parameter in self._parameters:
            if getattr(parameter, "main_grad", None) is not None:
                raise ValueError(f"MainGradients: a parameter of shape {tuple(parameter.shape)} has a main_grad")
            if not parameter.is_leaf:
                raise ValueError(f"MainGradients: a tensor of shape {tuple(parameter.shape)} is no leaf")
            if not parameter.is_floating_point():
                raise ValueError(f"MainGradients: parameters has a {parameter.dtype}; allowed: real floating dtypes")
        for parameter in self._parameters:
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            parameter.main_grad = torch.zeros_like(  # type: ignore[attr-defined]
                parameter, dtype=wide, memory_format=torch.contiguous_format, requires_grad=False
            )
        for parameter in self._parameters:
            gather(parameter)
        self._hooks = [p.register_post_accumulate_grad_hook(gather) for p in self._parameters]

    def gradients(self) -> list[Tensor]:
        return [p.main_grad for p in self._parameters]  # type: ignore[attr-defined]

    def zero(self) -> None:
        torch._foreach_zero_(self.gradients())

    def remove(self) -> None:
        """Gradients become `.grad` again."""
        for hook, parameter in zip(self._hooks, self._parameters, strict=True):
            hook.remove()
            del parameter.main_grad  # type: ignore[attr-defined]
        self._hooks, self._parameters = [], []


@torch.no_grad()
def gather(parameter: Tensor) -> None:
    """A `.grad` joins the buffer. Hooks are called where a product has filled the buffer, too: then there is none."""
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The whole gradient: in its buffer, where it has one and takes gradients, otherwise `.grad`. Raises RuntimeError
    where both hold some: all that a backward makes is in the buffer, so that somebody else's is in `.grad`."""
    main: Tensor | None = getattr(parameter, "main_grad", None) if parameter.requires_grad else None
    if main is not None and parameter.grad is not None:
        raise RuntimeError(
            f"main_grad: a parameter of shape {tuple(parameter.shape)} has a .grad beside its buffer, which no "
            "backward left there; DistributedDataParallel does so where it sums: run micro-batches in its no_sync(), "
            "and sum the buffers by llmengine.training.distributed.sum_gradients"
        )
    return parameter.grad if main is None else main
