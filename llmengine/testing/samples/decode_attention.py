"""Cases of attention over a cache: every option, contiguous and paged, lengths around a split, NaN in unused slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.functional.arguments import autocast
from llmengine.testing.sample import Operator, Sample


def tokens_of(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """The sequence's tokens in a cache, (key heads, length, dim)."""
    if block_table is None:
        return cache[b, :, :length]
    slots = torch.arange(length, device=cache.device)
    size = max(1, cache.shape[1])
    return cache[block_table[b].long()[slots // size], slots % size].transpose(0, 1)


def plain(query, key_cache, value_cache, cache_lengths, block_table=None, *, return_lse=False, **more):
    """PyTorch's attention of each sequence over its own tokens, as far as it has the options; else written out."""
    query, key_cache, value_cache = autocast(query, key_cache, value_cache)  # as PyTorch's attention does
    pairs = []
    for b, n in enumerate(cache_lengths.tolist()):
        key, value = (tokens_of(x, b, n, block_table) for x in (key_cache, value_cache))
        pairs.append(_one(query[b], key, value, b, return_lse, dict(more)))
    if not pairs:
        wide = torch.promote_types(query.dtype, torch.float32)
        empty = query.new_empty(*query.shape[:3], value_cache.shape[3]), query.new_empty(query.shape[:3], dtype=wide)
        return empty if return_lse else empty[0]
    output, lse = (torch.stack(x) for x in zip(*pairs, strict=True))
    return (output, lse) if return_lse else output


def _one(query, key, value, b, return_lse, more):
    (heads, rows, dim), length = query.shape, key.shape[1]
    group = heads // max(1, key.shape[0])
    key, value = (x.repeat_interleave(max(1, group), 0) for x in (key, value))
    distance = torch.arange(length) - torch.arange(length - rows, length)[:, None]
    left = more.pop("window_size", (-1, -1))[0]
    seen = (distance <= 0) & ((distance >= -left) | (left < 0))
    scale = more.get("scale")
    if not return_lse and not set(more) - {"scale"}:
        output = torch_functional.scaled_dot_product_attention(query[None], key[None], value[None], seen, scale=scale)
        return torch.where(seen.any(-1, keepdim=True), output[0], 0.0), query.new_zeros(heads, rows)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * (dim**-0.5 if scale is None else scale)
    if cap := more.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if (slopes := more.get("alibi_slopes")) is not None:
        scores = scores + (slopes if slopes.ndim == 1 else slopes[b])[:, None, None] * distance  # 0 or less where seen
    if (table := more.get("distance_bias")) is not None:
        farthest = table.shape[1] // 2
        scores = scores + table.to(wide)[:, distance.clamp(-farthest, farthest) + farthest]
    scores = torch.where(seen, scores, -torch.inf)
    sinks = more.get("sinks")
    column = torch.full((heads,), -torch.inf) if sinks is None else sinks
    scores = torch.cat([scores, column.to(wide)[:, None, None].expand(heads, rows, 1)], -1)
    lse = scores.logsumexp(-1)
    p = torch.where(lse[..., None] == -torch.inf, 0.0, scores.softmax(-1)[..., :-1])
    return (p @ value.to(wide)).to(query.dtype), lse


class _Maker:
    """Appends samples, with random tensors from a seeded generator."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.samples: list[Sample] = []

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def add(
        self, name: str, lengths: list[int], rows: int, heads: int, key_heads: int, dim: int,
        value_dim: int | None = None, *, capacity: int | None = None, page: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """page: the slots of one, of a paged cache. All slots without a token hold NaN."""
        batch, value_dim = len(lengths), value_dim or dim
        capacity = max([1, *lengths]) + 3 if capacity is None else capacity
        query = self.randn(batch, heads, rows, dim)
        caches = [self.randn(batch, key_heads, capacity, n) for n in (dim, value_dim)]
        for b, length in enumerate(lengths):
            for cache in caches:
                cache[b, :, length:] = torch.nan
        arguments: list = [query, *caches, torch.tensor(lengths, dtype=torch.int32)]
        if page:
            arguments[1:3], table = self._paged(caches, lengths, page)
            arguments.append(table)
        options.setdefault("return_lse", True)
        float32 = tuple(k for k in ("alibi_slopes",) if k in options)
        self.samples.append(Sample(name, tuple(arguments), options, (0, 1, 2, *_floats(options)), float32))

    def _paged(self, caches: list[Tensor], lengths: list[int], size: int) -> tuple[list[Tensor], Tensor]:
        """The same tokens in shuffled pages; entries of the table past a sequence's tokens are of no page."""
        used = [-(-n // size) for n in lengths]
        longest = max([1, *used])
        order = torch.randperm(sum(used) + 2, generator=self.generator)
        table = torch.full((len(lengths), longest), 2**30, dtype=torch.int32)
        paged = [torch.full((len(order), size, x.shape[1], x.shape[3]), torch.nan, dtype=x.dtype) for x in caches]
        taken = 0
        for b, (count, length) in enumerate(zip(used, lengths, strict=True)):
            table[b, :count] = order[taken : taken + count]
            slots = torch.arange(length)
            for cache, pages in zip(caches, paged, strict=True):
                pages[order[taken + slots // size], slots % size] = cache[b, :, :length].transpose(0, 1)
            taken += count
        return paged, table


def _floats(options: dict[str, Any]) -> list[str]:
    return [k for k, v in options.items() if isinstance(v, Tensor)]


def _samples() -> list[Sample]:
    m = _Maker(3)
    m.add(
        "everything", [9, 0, 4], 2, 4, 2, 8, 6, page=4, window_size=(5, -1), softcap=3.0,
        alibi_slopes=m.randn(3, 4).abs(), distance_bias=m.randn(4, 7), sinks=m.randn(4), scale=-0.4,
    )  # fmt: skip
    for lengths in ([1], [127, 128, 129], [5, 300, 64], [0, 2, 0]):
        for rows, heads, key_heads in [(1, 2, 2), (1, 6, 2), (4, 3, 1), (2, 1, 1)]:
            m.add(
                f"lengths {lengths}, {rows} rows, heads {heads} over {key_heads}", lengths, rows, heads, key_heads, 16
            )
    for dim, value_dim in [(1, 1), (3, 5), (40, 59), (64, 64), (80, 128), (129, 33), (256, 256)]:
        m.add(f"head_dim {dim} {value_dim}", [35, 150], 2, 4, 2, dim, value_dim, page=16 if dim % 2 else None)
    for page in (1, 16, 48, 256):
        m.add(f"pages of {page}", [70, 3, 260], 1, 4, 4, 24, page=page)
        m.add(f"pages of {page}, window", [70, 3, 260], 3, 4, 1, 24, page=page, window_size=(40, 0))
    for rows, heads in [(5, 7), (16, 2), (9, 8)]:
        m.add(f"{rows} rows of {heads} heads over one", [170, 6], rows, heads, 1, 32)
    several: dict[str, dict[str, Any]] = {
        "scale 0": {"scale": 0.0}, "large scale": {"scale": 20.0}, "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": m.randn(4).abs()}, "window of one": {"window_size": (0, 0)},
        "window": {"window_size": (100, -1)}, "wide window": {"window_size": (5000, -1)},
        "distances": {"distance_bias": m.randn(4, 41)}, "one distance": {"distance_bias": m.randn(4, 1)},
        "sinks": {"sinks": m.randn(4)}, "high sinks": {"sinks": 30 + m.randn(4)}, "output alone": {"return_lse": False},
        "absent sinks": {"sinks": torch.tensor([0.5, -torch.inf, 1.0, -torch.inf], dtype=torch.float64)},
        "distances never seen": {"distance_bias": torch.full((4, 5), -torch.inf, dtype=torch.float64)},
    }  # fmt: skip
    for name, options in several.items():
        m.add(name, [140, 0, 33], 2, 4, 2, 16, **options)
    for batch, heads, rows in [(0, 2, 1), (2, 0, 1), (2, 2, 0)]:
        m.add(f"empty {(batch, heads, rows)}", [5] * batch, rows, heads, heads, 8)
    m.add("no slots", [0, 0], 1, 2, 2, 8, capacity=0)
    return m.samples


OPERATORS = [
    Operator("decode_attention", functional.decode_attention, _samples, plain, "decode_attention", inference=True)
]
