"""PyTorch's own attention on llmengine's kernels: `torch.nn.functional.scaled_dot_product_attention` and whatever else
calls ATen's flash attention operators, for tensors on a GPU.

    from llmengine.integrations import torch_attention
    torch_attention.register()                                       # makes the name known, where PyTorch has names
    torch.nn.attention.activate_flash_attention_impl("llmengine")    # restore_flash_attention_impl() undoes it

PyTorch decides when flash attention is taken, as before (16-bit types, no mask); with it come dropout and a backward
whose bits repeat. Between forward and backward PyTorch keeps one log-sum-exp a row in float32, and ours its remainder
besides: of 16-bit operands it changes nothing that is not rounded away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmengine.functional.arguments import draw_seed
from llmengine.ops import attention as ops
from llmengine.ops import registry

NAME = "llmengine"


def register() -> bool:
    """Makes "llmengine" known to `torch.nn.attention.activate_flash_attention_impl`; False: this PyTorch has no such
    names."""
    known = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if known is None:
        return False
    known(NAME, register_fn=_activate)
    return True


def _activate() -> registry.Overrides:
    backends = {name: registry.load(name) for name in registry.PREFERENCE["cuda"] if name != "reference"}
    if all(b.unavailable for b in backends.values()):
        reasons = "; ".join(f"{name}: {b.unavailable}" for name, b in backends.items())
        raise RuntimeError(f"llmengine has no kernels for GPUs here ({reasons})")
    return registry.override(KERNELS, "CUDA")


# ---- (batch, heads, tokens, head_dim) --------------------------------------------------------------------------------


def _sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _refuse("_scaled_dot_product_flash_attention", return_debug_mask=return_debug_mask)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    options = _options(query, key, seed, (-1, 0 if is_causal else -1), scale, dropout_p)
    output, lse, _ = ops.attention_forward(query, key, value, *options)
    return (
        _stored_as(query, output), lse, None, None, query.shape[2], key.shape[2], *_random_state(query, seed),
        query.new_empty(0),
    )  # fmt: skip


def _sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    options = _options(query, key, _seed(philox_seed, dropout_p), (-1, 0 if is_causal else -1), scale, dropout_p)
    return _backward(grad_out, query, key, value, out, logsumexp, options)


# ---- (batch, tokens, heads, head_dim), or packed: (tokens, heads, head_dim) ------------------------------------------


def _forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    _refuse(
        "_flash_attention_forward", return_debug_mask=return_debug_mask, seqused_k=seqused_k, block_table=block_table
    )
    seed = draw_seed(query.device) if dropout_p > 0 else None
    q, k, v = (_heads_first(x) for x in (query, key, value))
    window = _window(is_causal, window_size_left, window_size_right)
    cuts = () if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)
    options = _options(q, k, seed, window, scale, dropout_p, alibi_slopes, *cuts)
    output, lse, _ = ops.attention_forward(q, k, v, *options)
    lse = lse if cum_seq_q is None else lse[0]
    return _stored_as(query, _heads_last(output, query)), lse, *_random_state(query, seed), query.new_empty(0)


def _forward_into(out, *arguments, **options):
    output, lse, *_ = _forward(*arguments, **options)
    out.copy_(output)
    return lse


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    grad, q, k, v, o = (_heads_first(x) for x in (grad_out, query, key, value, out))
    window = _window(is_causal, window_size_left, window_size_right)
    cuts = () if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)
    options = _options(q, k, _seed(rng_state, dropout_p), window, scale, dropout_p, None, *cuts)
    lse = logsumexp if cum_seq_q is None else logsumexp[None]
    gradients = _backward(grad, q, k, v, o, lse, options)
    return tuple(
        _stored_as(x, _heads_last(gradient, x)) for x, gradient in zip((query, key, value), gradients, strict=True)
    )


KERNELS: dict[str, Callable] = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_into,
    "_flash_attention_backward": _flash_backward,
}


# ---- what they share -------------------------------------------------------------------------------------------------


def _options(
    query: Tensor, key: Tensor, seed: Tensor | None, window: tuple[int, int], scale: float | None, dropout_p: float,
    alibi_slopes: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_q: int | None = None, max_k: int | None = None,
) -> tuple:  # fmt: skip
    """As the operators' schema has them (llmengine/ops/attention.py). Causal attention is aligned bottom-right: PyTorch
    does not bring top-left here unless there are as many queries as keys; `causal_lower_right` it does."""
    sequences = query.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    slopes = None if alibi_slopes is None else alibi_slopes.float().expand(sequences, query.shape[1])
    longest = (query.shape[2], key.shape[2]) if max_q is None else (max_q, max_k)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return (
        None, slopes, None, None, cu_seqlens_q, cu_seqlens_k, *longest, seed, *window, True, scale, 0.0, dropout_p,
    )  # fmt: skip


def _backward(grad_out, query, key, value, out, lse, options):
    lost = torch.zeros_like(lse)  # what rounding took from lse: PyTorch does not keep it
    gradients = ops.attention_backward(
        grad_out, None, query, key, value, out, lse.contiguous(), lost, *options, False, False, False
    )
    return tuple(_stored_as(x, gradient) for x, gradient in zip((query, key, value), gradients[:3], strict=True))


def _heads_first(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim)"""
    return x.transpose(1, 2) if x.ndim == 4 else x.transpose(0, 1)[None]


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(1, 2) if like.ndim == 4 else x[0].transpose(0, 1)


def _stored_as(like: Tensor, x: Tensor) -> Tensor:
    """`x` in memory as torch.empty_like(like) would be, which compiled code counts on."""
    strides = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == strides else torch.empty_like(like).copy_(x)


def _window(is_causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, 0 if is_causal else -1 if right is None else right


def _random_state(query: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """What PyTorch keeps for the backward: two 64-bit words, of which ours are the seed and 0, and one more."""
    words = torch.zeros(2, dtype=torch.int64, device=query.device)
    if seed is not None:
        words[:1] = seed
    return words.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=query.device)


def _seed(rng_state: Tensor, dropout_p: float) -> Tensor | None:
    return rng_state.view(torch.int64)[:1] if dropout_p > 0 else None


def _refuse(op: str, **unsupported: object) -> None:
    for name, given in unsupported.items():
        if given is not None and given is not False:
            raise RuntimeError(f"{op}: llmengine's implementation does not take {name}")
