"""Attention in CUDA: csrc/cuda/attention_sm80_forward.cu, and for the backward _keys.cu, _rows.cu and _bias.cu; on
Hopper, where LLMENGINE_CUDA_ATTENTION=sm90a asks for them, csrc/cuda/attention_sm90a_*.cu for what those take. Where
LLMENGINE_CUDA_JIT=1 asks for them, sm_80's kernels of the very head dim (csrc/cuda/compiled.h)."""

from __future__ import annotations

import math

import torch

from llmengine.backends.buffers import empty_rows_first
from llmengine.backends.cuda.native import Native, unit_last_stride
from llmengine.ops import registry
from llmengine.ops.registry import Kernel, kernel

OPTIONS = (
    "mask", "alibi_slopes", "distance_bias", "sinks", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "seed", "window_left", "window_right", "bottom_right", "scale", "softcap", "dropout_p",
)  # fmt: skip
WIDEST = 256  # the widest head whose sums stay in registers
MOST_TOKENS = 2**30  # positions, and windows beside them, are 32-bit numbers
WIDEST_IN_ONE_PASS = 128  # the widest head whose sums for keys stay in registers of blocks that make scores once
FARTHEST = 1848  # M of a bias by distance whose gradient is wanted: its table lies in shared memory beside the tiles
DISTANCE_ROWS = 64  # of a tile, as in csrc/cuda/attention.h
GRID_ROWS, REMADE_ROWS = 64, 128  # of tiles, as in csrc/cuda/attention_grid.h
LEAST_OWN = 64  # lines of a tile that a block of Hopper's owns, as in csrc/cuda/attention_sm90a.cuh


def kernels(native: Native) -> dict[str, Kernel]:
    table: dict[str, Kernel] = {}

    def forward_refuses(query, key, value, mask, *options):
        if reason := native.refuses_tensors(query, key, value, mask):
            return reason
        if query.dtype == torch.float32:
            return f"the {native.backend} attention multiplies bfloat16 and float16, got float32"
        if (widest := max(query.shape[3], value.shape[3])) > WIDEST:
            return f"the {native.backend} attention takes head dims up to {WIDEST}, got {widest}"
        if (tokens := max(query.shape[2], key.shape[2])) > MOST_TOKENS:
            return f"the {native.backend} attention takes up to {MOST_TOKENS} tokens, got {tokens}"
        return native.refuses_attention(query)

    def backward_refuses(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
        *given, _, want_grad_distance_bias, _ = options
        if want_grad_distance_bias and (farthest := given[2].shape[1] // 2) > FARTHEST:
            return f"the {native.backend} attention has gradients of distances up to {FARTHEST}, got {farthest}"
        return native.refuses_tensors(grad_output, grad_lse, output, lse, lse_low) or forward_refuses(
            query, key, value, *given
        )

    @kernel(table, "attention_forward", forward_refuses)
    def attention_forward(query, key, value, *options):
        output = empty_rows_first(query, value.shape[3])
        lse, lse_low = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
        given = _arguments(query, key, value, options)
        given |= {"output": output, "lse": lse, "lse_low": lse_low}
        if by_hopper(native, **{name: given[name] for name in ("query", "key", "value")}):
            turns = turns_room(1, query, key, given["cu_seqlens_q"])
            native.call("attention_forward_sm90a", query, **given, turns=turns, spans=_spans(key, given["mask"]))
        else:
            native.call("attention_forward", query, **given, exact=native.wants_exact())
        native.tell_launched()
        return output, lse, lse_low

    @kernel(table, "attention_backward", backward_refuses)
    def attention_backward(grad_output, grad_lse, query, key, value, output, lse, lse_low, *options):
        *given, want_grad_mask, want_grad_distance_bias, want_grad_sinks = options
        arguments = _arguments(query, key, value, given)
        mask, bias, sinks = given[0], arguments["distance_bias"], arguments["sinks"]
        shift, base, delta = (torch.empty_like(lse) for _ in range(3))
        grad_query, grad_key, grad_value = (empty_rows_first(x, x.shape[3]) for x in (query, key, value))
        grad_mask = lse.new_empty(mask.shape if want_grad_mask else (0,))
        by_kernel = want_grad_mask and mask.shape[3] != 1
        partial = lse.new_empty(_parts(query, arguments["cu_seqlens_q"], bias)) if want_grad_distance_bias else None
        arguments["grad_output"] = unit_last_stride(grad_output)
        kernel = "attention_backward"
        of_hopper: dict[str, torch.Tensor | None] = {}
        if by_hopper(native, **{name: arguments[name] for name in ("query", "key", "value", "grad_output")}):
            kernel = "attention_backward_sm90a"
            of_hopper["turns"] = turns_room(2, query, key, arguments["cu_seqlens_q"])
            of_hopper["spans"] = _spans(key, arguments["mask"])
            if native.wants_one_pass():
                reason = one_pass_refuses(query, value, arguments["cu_seqlens_q"])
                registry.tell(f"in two passes: {reason}" if reason else "in one pass over the scores")
                if reason is None:
                    kernel = "attention_backward_one_pass"
                    of_hopper |= _grid(**arguments) | _mask_sums(query, grad_mask if by_kernel else None)
        elif native.wants_one_pass():
            registry.tell("in two passes: one is for Hopper's kernels")
        native.call(
            kernel, query, **arguments, **of_hopper,
            grad_lse=None if grad_lse is None else grad_lse.contiguous(), output=output, lse=lse, lse_low=lse_low,
            grad_query=grad_query, grad_key=grad_key, grad_value=grad_value, grad_mask=grad_mask if by_kernel else None,
            grad_distance_bias=None, grad_sinks=None, shift=shift, base=base, delta=delta,
            partial_distances=partial, exact=native.wants_exact(),
        )  # fmt: skip
        native.tell_launched()
        # what the sink's probability takes of each row's gradient
        taken = None if sinks is None else torch.exp(sinks[:, None] - lse - lse_low) * delta
        if want_grad_mask and not by_kernel:
            grad_mask = _grad_of_row_bias(grad_lse, lse, taken).sum_to_size(mask.shape).contiguous()
        grad_sinks = lse.new_empty(0)
        if taken is not None and want_grad_sinks:
            grad_sinks = -taken.masked_fill(lse == -math.inf, 0.0).sum((0, 2))
        grad_distance_bias = lse.new_empty(0) if partial is None else partial.sum(0)
        return grad_query, grad_key, grad_value, grad_mask, grad_distance_bias, grad_sinks

    return table


def by_hopper(native: Native, **operands) -> bool:
    """Whether Hopper's kernels run a call; where they are asked for and do not, `explain` says why."""
    if not native.wants_hopper_attention():
        return False
    if reason := hopper_refuses(native, **operands):
        registry.tell(f"by every GPU's kernels: {reason}")
    return reason is None


def hopper_refuses(native: Native, **operands) -> str | None:
    """Why Hopper's kernels do not take a call, which every GPU's then do: their tensor maps cannot tell the layout."""
    for name, tensor in operands.items():
        if reason := native.module.tensor_map_refuses(tensor=tensor):
            return f"{name}: {reason}"
    return None


def one_pass_refuses(query, value, cu_seqlens_q) -> str | None:
    if (widest := max(query.shape[3], value.shape[3])) > WIDEST_IN_ONE_PASS:
        return f"one takes head dims up to {WIDEST_IN_ONE_PASS}, got {widest}"
    if (rows := places_of_tiles(query, cu_seqlens_q, GRID_ROWS) * query.shape[1] * GRID_ROWS) >= 2**31:
        return f"one takes less than 2^31 rows of all heads, in tiles of {GRID_ROWS}, got {rows}"
    return None


def _zeros(on, *sizes):
    return torch.zeros(sizes, dtype=torch.int32, device=on.device)


def places_of_tiles(x, cu_seqlens, lines: int) -> int:
    """Of `lines` tokens of x, as csrc/cuda/attention_places.h counts them."""
    batch, _, tokens, _ = x.shape
    return batch * -(-tokens // lines) if cu_seqlens is None else tokens // lines + len(cu_seqlens) - 1


def turns_room(kernels: int, query, key, cu_seqlens_q) -> torch.Tensor:
    """From which the blocks of so many of Hopper's kernels draw their tiles (csrc/cuda/attention_sm90a.h)."""
    if cu_seqlens_q is None:
        return _zeros(query, kernels, 4)
    longer = max(query, key, key=lambda x: x.shape[2])
    places = places_of_tiles(longer, cu_seqlens_q, LEAST_OWN)
    return torch.empty(kernels, 4 + 4 * places, dtype=torch.int32, device=query.device)


def _spans(key, mask) -> torch.Tensor | None:
    """Room for where keys are seen, where a mask hides padding: is_padding() of csrc/cuda/attention_call.h."""
    if mask is None or mask.dtype != torch.bool or mask.shape[3] != key.shape[2]:
        return None
    if any(mask.shape[d] > 1 and mask.stride(d) != 0 for d in (1, 2)):
        return None
    return torch.empty(mask.shape[0], 2, dtype=torch.int32, device=key.device)


def _grid(query, key, value, cu_seqlens_q, **options):
    """What one pass adds up on, and its room (csrc/cuda/attention_sm90a.h, attention_grid.h)."""
    batch, heads, rows, _ = query.shape
    widest = max(query.shape[3], value.shape[3])
    dim = 64 if widest <= 64 else 96 if widest <= 96 else 128
    sequences = batch if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    tiles, remade = (places_of_tiles(query, cu_seqlens_q, n) for n in (GRID_ROWS, REMADE_ROWS))
    floats = {"dtype": torch.float32, "device": query.device}
    return {
        "grid": _zeros(query, tiles, heads, GRID_ROWS, dim),
        "remade": _zeros(query, 1 + remade * heads),
        "largest": _zeros(query, sequences, key.shape[1], 3),
        "squares": torch.empty(2, batch, heads, rows, **floats),
        "of_rows": torch.empty(tiles, heads, 4, GRID_ROWS, **floats),
    }


def _mask_sums(query, grad_mask):
    """One pass leaves a mask's gradient behind where it has a row for each of the queries': it stores that of keys that
    are seen. Where sequences or heads share those rows, it adds them up on integers, of which all are then stored."""
    batch, heads, rows, _ = query.shape
    none = {"mask_sums": None, "mask_bounds": None}
    if grad_mask is None or grad_mask.shape[2] != rows:
        return none
    if grad_mask.shape[:2] == (batch, heads):
        grad_mask.zero_()
        return none
    sums = torch.zeros_like(grad_mask, dtype=torch.int64)
    return {"mask_sums": sums, "mask_bounds": _zeros(query, grad_mask.shape[:3].numel() + 1)}


def _grad_of_row_bias(grad_lse, lse, taken):
    """A bias that is one for all keys of a row moves lse and, where there is a sink, what it leaves to the keys."""
    grad = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad = grad if taken is None else grad + taken
    return grad.masked_fill(lse == -math.inf, 0.0)[..., None]


def _parts(query, cu_seqlens_q, bias):
    """Sizes of what is yet to be added up of the gradient of a bias by distance: a table for each tile of rows, those
    behind the last packed sequence included."""
    places = places_of_tiles(query, cu_seqlens_q, DISTANCE_ROWS) + (cu_seqlens_q is not None)
    return places, query.shape[1], bias.shape[1]


def _arguments(query, key, value, options):
    """The arguments that forward and backward share, by their names in csrc/ops/attention.h."""
    named = dict(zip(OPTIONS, options, strict=True))
    for name in ("distance_bias", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seed"):
        named[name] = None if named[name] is None else named[name].contiguous()
    mask = named.pop("mask")
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.float()
    operands = {"query": query, "key": key, "value": value, "mask": mask}
    return {name: unit_last_stride(t) for name, t in operands.items()} | named
