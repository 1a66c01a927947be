"""Cases of attention: every option alone and together, sizes around tile edges, empty and fully masked rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from llmengine import functional
from llmengine.ops.registry import backend
from llmengine.testing.sample import Operator, Sample


def plain_sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, **more):
    """PyTorch's function, given the windows and biases as a dense mask; written out where it has no such option."""
    if dropout_p:  # PyTorch draws other numbers
        with backend("reference"):
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **more
            )
    left, right = more.pop("window_size", (-1, -1))
    causal = more.pop("causal", None)
    band = (left, 0 if is_causal or causal else right, causal == "bottom_right")
    return _plain(query, key, value, attn_mask, scale, enable_gqa, band, more)


def _plain(query, key, value, attn_mask, scale, enable_gqa, band, more):
    left, right, bottom_right = band
    rows, keys = query.shape[-2], key.shape[-2]
    distance = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows if bottom_right else 0)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    bias: Tensor | None = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        bias = attn_mask
    if (slopes := more.get("alibi_slopes")) is not None:
        alibi = -slopes[..., None, None] * distance.abs()
        bias = alibi if bias is None else bias + alibi
    if (table := more.get("distance_bias")) is not None:
        farthest = table.shape[1] // 2
        entry = distance.clamp(-farthest, farthest) + farthest
        gathered = table.to(torch.promote_types(query.dtype, torch.float32))[:, entry]  # its gradient adds in float32
        bias = gathered if bias is None else bias + gathered
    if not (more.get("softcap") or more.get("return_lse")):
        mask: Tensor | None = seen if bias is None else torch.where(seen, bias, -torch.inf).to(query.dtype)
        if more.get("sinks") is not None:
            key, value, mask = _with_sinks(query, key, value, mask, more["sinks"])
        elif bias is None and seen.all():
            mask = None
        return torch_functional.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, enable_gqa=enable_gqa
        )
    return _written_out(query, key, value, seen, bias, scale, more)


def _with_sinks(query, key, value, mask, sinks):
    """A last key and value of zeros, which the mask gives the sinks as logits."""
    key, value = (torch_functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    scores = (*query.shape[:-1], key.shape[-2] - 1)
    return key, value, torch.cat([mask.expand(scores), _column(sinks, scores).to(mask.dtype)], -1)


def _column(sinks, scores):
    """Sinks as one more key's scores."""
    return sinks[:, None, None].expand(*scores[:-1], 1)


def _written_out(query, key, value, seen, bias, scale, more):
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[-3] // max(1, key.shape[-3])
    k, v = (x.to(wide).repeat_interleave(max(1, group), -3) for x in (key, value))
    scores = query.to(wide) @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap := more.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias.to(wide)
    scores = torch.where(seen, scores, -torch.inf)
    if (sinks := more.get("sinks")) is not None:
        column = _column(sinks, scores.shape).to(wide)
        seen = torch.cat([seen.expand(scores.shape), column > -torch.inf], -1)
        scores, v = torch.cat([scores, column], -1), torch_functional.pad(v, (0, 0, 0, 1))
    some = seen.expand(scores.shape).any(-1, keepdim=True)
    scores = torch.where(some, scores, 0.0)  # rows that see nothing, without the NaN of their gradients
    output = torch.where(some, torch.softmax(scores, -1) @ v, 0.0).to(query.dtype)
    if not more.get("return_lse"):
        return output
    return output, torch.where(some.squeeze(-1), scores.logsumexp(-1), -torch.inf)


def plain_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, is_causal=False, **more):
    """PyTorch's function, sequence by sequence."""
    if more.get("dropout_p"):
        with backend("reference"):
            return functional.varlen_attention(
                query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=is_causal, **more
            )
    lse = more.get("return_lse")
    slopes, scale, causal = more.pop("alibi_slopes", None), more.pop("scale", None), more.pop("causal", None)
    left, right = more.pop("window_size", (-1, -1))
    band = (left, 0 if is_causal or causal else right, causal != "top_left")
    outputs, logs = [], []
    for n in range(len(cu_seqlens_q) - 1):
        q = query[cu_seqlens_q[n] : cu_seqlens_q[n + 1]].transpose(0, 1)
        k, v = (x[cu_seqlens_k[n] : cu_seqlens_k[n + 1]].transpose(0, 1) for x in (key, value))
        if slopes is not None:
            more["alibi_slopes"] = slopes if slopes.ndim == 1 else slopes[n]
        result = _plain(q, k, v, None, scale, True, band, more)
        outputs.append((result[0] if lse else result).transpose(0, 1))
        if lse:
            logs.append(result[1])
    rest = query.shape[0] - int(cu_seqlens_q[-1])
    spare = (0 * query[cu_seqlens_q[-1] :, :, :1]).expand(-1, -1, value.shape[2])
    output = torch.cat([*outputs, spare])
    if not lse:
        return output
    return output, torch.cat([*logs, logs[0].new_full((query.shape[1], rest), -torch.inf)], dim=1)


class _Maker:
    def __init__(self, seed: int):
        self.generator, self.tables = (torch.Generator().manual_seed(n) for n in (seed, seed + 100))
        self.samples: list[Sample] = []

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def table(self, heads, farthest):
        """A bias by distance, of numbers of its own: with or without it, a sample's operands are the same."""
        return torch.randn(heads, 2 * farthest + 1, generator=self.tables, dtype=torch.float64)

    @staticmethod
    def ones(*shape):
        return torch.ones(shape, dtype=torch.float64)

    @staticmethod
    def sinks(heads):
        return torch.linspace(0, 1, heads, dtype=torch.float64)

    def chance(self, *shape, p=0.5):
        return torch.rand(shape, generator=self.generator) < p

    def add(self, name, args, **options):
        slopes = ("alibi_slopes",) if "alibi_slopes" in options else ()
        self.samples.append(Sample(name, args, options, slopes, slopes))

    def padded(self, name, batch, heads, rows, keys, dim, value_dim=None, key_heads=None, **options):
        key_heads = heads if key_heads is None else key_heads
        if key_heads != heads:
            options["enable_gqa"] = True
        q, k = self.randn(batch, heads, rows, dim), self.randn(batch, key_heads, keys, dim)
        self.add(name, (q, k, self.randn(batch, key_heads, keys, value_dim or dim)), **options)

    def packed(self, name, rows, keys, heads, key_heads, dim, value_dim=None, spare=0, **options):
        """`spare` tokens follow the last sequence."""
        cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (rows, keys))
        q, k = self.randn(sum(rows) + spare, heads, dim), self.randn(sum(keys) + spare, key_heads, dim)
        v = self.randn(sum(keys) + spare, key_heads, value_dim or dim)
        self.add(name, (q, k, v, cu_q, cu_k, max([0, *rows]), max([0, *keys])), **options)


CAUSAL: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"is_causal": True}, "bottom right": {"causal": "bottom_right"},
    "window": {"window_size": (9, 4)}, "causal window": {"is_causal": True, "window_size": (5, -1)},
    "bottom right window": {"causal": "bottom_right", "window_size": (12, -1)},
}  # fmt: skip


# (batch, heads, rows, keys)
EMPTY = [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0)]

# (name, M, what goes with a bias of the distances -M ... M). In samples of many heads: an entry of its gradient sums
# errors over rows, and the law compares mean errors.
DISTANCES: list[tuple[str, int, dict[str, Any]]] = [
    ("alone", 20, {}),
    ("causal", 33, {"is_causal": True, "return_lse": True}),
    ("softcap, dropout", 7, {"softcap": 2.0, "dropout_p": 0.3}),
    ("window", 70, {"causal": "bottom_right", "window_size": (50, -1)}),
    ("alone", 0, {"return_lse": True}),
    ("narrow window", 1, {"causal": "top_left", "window_size": (3, -1)}),
    ("beyond all", 300, {"causal": "bottom_right"}),
]


# What goes with sinks. In samples of many heads, as DISTANCES.
SINKS: dict[str, dict[str, Any]] = {
    "alone": {}, "lse": {"return_lse": True}, "causal": {"is_causal": True},
    "softcap": {"softcap": 1.5, "return_lse": True}, "dropout": {"dropout_p": 0.3, "return_lse": True},
    "window": {"causal": "bottom_right", "window_size": (20, -1), "return_lse": True},
}  # fmt: skip


def _sdpa_samples() -> list[Sample]:
    m = _Maker(0)
    m.padded(
        "everything", 2, 4, 5, 7, 8, 6, 2, attn_mask=m.randn(2, 1, 5, 7), causal="bottom_right", window_size=(4, -1),
        softcap=3.0, alibi_slopes=m.randn(4).abs(), distance_bias=m.table(4, 2), sinks=m.sinks(4), dropout_p=0.2,
        scale=-0.4, return_lse=True,
    )  # fmt: skip
    for name, options in CAUSAL.items():
        for rows, keys in [(70, 70), (33, 130), (130, 33), (1, 64), (64, 1)]:
            m.padded(f"{name} {rows}x{keys}", 1, 2, rows, keys, 16, **options)
    for dim, value_dim in [(1, 1), (3, 5), (59, 59), (64, 64), (80, 128), (129, 33), (200, 16), (256, 256)]:
        m.padded(f"head_dim {dim} {value_dim}", 1, 2, 35, 50, dim, value_dim, is_causal=True)
    for heads, key_heads in [(4, 1), (6, 2), (6, 3)]:
        m.padded(f"heads {heads} over {key_heads}", 2, heads, 20, 30, 24, key_heads=key_heads, return_lse=True)
    for shape in [(2, 3, 40, 70), (1, 3, 40, 70), (2, 1, 1, 70), (40, 1), (1,), (3, 1, 70), (2, 3, 1, 1)]:
        mask = m.randn(*shape)
        m.padded(f"bias {shape}", 2, 3, 40, 70, 16, attn_mask=mask)
        m.padded(f"mask {shape}", 2, 3, 40, 70, 16, attn_mask=mask > -0.5)
        infinite = torch.where(m.chance(*shape, p=0.3), -torch.inf, mask)
        m.padded(f"infinite bias {shape}", 2, 3, 40, 70, 16, attn_mask=infinite, is_causal=True)
    m.padded("bias of grouped heads", 2, 4, 40, 70, 16, key_heads=2, attn_mask=m.randn(4, 40, 70), softcap=2.0)
    empty = m.chance(2, 1, 40, 70)
    empty[:, :, 3:9] = False
    empty[1, :, 20:] = False
    m.padded("rows without keys", 2, 3, 40, 70, 16, attn_mask=empty, return_lse=True)
    m.padded("no key at all", 1, 1, 4, 6, 8, attn_mask=torch.zeros(4, 6, dtype=torch.bool), return_lse=True)
    for name, options in {
        "scale 0": {"scale": 0.0}, "negative scale": {"scale": -0.7}, "large scale": {"scale": 30.0},
        "softcap": {"softcap": 1.5}, "softcap causal": {"softcap": 1.5, "is_causal": True, "scale": 1.0},
        "alibi": {"alibi_slopes": m.randn(3).abs()}, "alibi per batch": {"alibi_slopes": m.randn(2, 3)},
        "lse": {"return_lse": True}, "dropout": {"dropout_p": 0.3, "return_lse": True},
        "dropout causal": {"dropout_p": 0.9, "is_causal": True},
        "dropout mask": {"dropout_p": 0.1, "attn_mask": m.chance(2, 1, 1, 75)},
        "window of one": {"window_size": (0, 0)}, "window to the right": {"window_size": (-1, 0)},
        "wide window": {"window_size": (500, 500)}, "window ahead": {"window_size": (0, 20)},
    }.items():  # fmt: skip
        m.padded(name, 2, 3, 40, 75, 16, **options)
    for batch, heads, rows, keys in EMPTY:
        m.padded(f"empty {(batch, heads, rows, keys)}", batch, heads, rows, keys, 8, return_lse=True)
    m.add("three dimensions", (m.randn(3, 9, 8), m.randn(3, 11, 8), m.randn(3, 11, 4), m.randn(3, 9, 11)))
    m.add("two dimensions", (m.randn(9, 8), m.randn(11, 8), m.randn(11, 8)), is_causal=True)
    m.add("five dimensions", (m.randn(2, 2, 3, 9, 8), *[m.randn(2, 2, 3, 11, 8)] * 2, m.randn(2, 1, 1, 9, 11)))
    m.add("broadcast batch", (m.randn(3, 9, 8), m.randn(2, 3, 11, 8), m.randn(1, 3, 11, 8)))
    m.add("broadcast heads", (m.randn(2, 1, 9, 8), m.randn(2, 3, 11, 8), m.randn(2, 3, 11, 8)))
    # one rounding of such a score shows in the output: enough rows that plain PyTorch meets unlucky ones as well
    m.padded("large scores", 4, 2, 40, 90, 32, scale=20.0, is_causal=True, return_lse=True)
    m.padded("several tiles", 1, 1, 300, 700, 32, causal="bottom_right", return_lse=True)
    for name, farthest, options in DISTANCES:
        for rows, keys in [(40, 75), (130, 101)]:
            bias = m.table(12, farthest)
            m.padded(
                f"distances to {farthest} {name} {rows}x{keys}", 1, 12, rows, keys, 16, distance_bias=bias, **options
            )
    never = m.table(3, 10)
    never[:, ::3] = -torch.inf
    m.padded("distances never seen", 2, 3, 40, 75, 16, distance_bias=never, return_lse=True)
    _sinks(m)
    for batch, heads, rows, keys in EMPTY:
        m.padded(f"bias of {(batch, heads, rows, keys)}", batch, heads, rows, keys, 8, attn_mask=m.ones(rows, keys))
    bias = m.ones(1, 2, 1, 0)
    m.padded("bias of no keys, sinks", 1, 2, 5, 0, 16, attn_mask=bias, sinks=m.sinks(2), return_lse=True)
    m.padded("distances of nothing", 2, 2, 0, 4, 8, distance_bias=m.table(2, 2), return_lse=True)
    return m.samples


def _sinks(m: _Maker) -> None:
    heads, sinks = 32, m.sinks(32)
    for name, options in SINKS.items():
        m.padded(f"sinks {name}", 1, heads, 40, 75, 8, sinks=sinks, **options)
    m.padded("sinks of several tiles", 1, heads, 130, 101, 8, sinks=sinks, is_causal=True, return_lse=True)
    m.padded("sinks of grouped heads", 2, heads, 20, 30, 8, key_heads=4, sinks=sinks, is_causal=True)
    for name, others in {"high": 30 + sinks, "low": sinks - 200, "large": 20 * sinks}.items():
        m.padded(f"{name} sinks", 1, heads, 40, 75, 8, sinks=others, scale=3.0, return_lse=True)
    absent = torch.where(torch.arange(heads) % 2 == 0, -torch.inf, sinks)
    empty = m.chance(2, 1, 24, 75)
    empty[:, :, 3:9] = False
    for name, some in {"sinks": sinks, "absent sinks": absent}.items():
        m.padded(f"{name} of rows without keys", 2, heads, 24, 75, 8, attn_mask=empty, sinks=some, return_lse=True)
        for shape in [(2, heads, 24, 75), (2, 1, 1, 75), (heads, 24, 1), (heads, 1, 1)]:
            m.padded(f"{name} and a bias {shape}", 2, heads, 24, 75, 8, attn_mask=m.randn(*shape), sinks=some)
    bias = m.randn(heads, 24, 1)
    m.padded("sinks and a bias of rows, lse", 2, heads, 24, 75, 8, attn_mask=bias, sinks=sinks, return_lse=True)
    for batch, rows, keys in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        m.padded(f"sinks of nothing {(batch, rows, keys)}", batch, 2, rows, keys, 8, sinks=m.sinks(2), return_lse=True)


def _varlen_samples() -> list[Sample]:
    m = _Maker(1)
    m.packed(
        "everything", [2, 0, 3], [4, 1, 3], 4, 2, 8, 6, is_causal=True, window_size=(2, -1), softcap=3.0,
        alibi_slopes=m.randn(4).abs(), distance_bias=m.table(4, 4), sinks=m.sinks(4), dropout_p=0.2, return_lse=True,
    )  # fmt: skip
    for name, options in CAUSAL.items():
        m.packed(f"{name} equal", [5, 70, 33, 1], [5, 70, 33, 1], 2, 2, 16, **options)
        m.packed(f"{name} unequal", [5, 40, 33, 8], [60, 30, 1, 7], 2, 1, 16, **options)
    for where in (0, 1, 2):
        lengths = [4, 6]
        lengths.insert(where, 0)
        m.packed(f"empty sequence {where}", lengths, lengths, 2, 2, 8)
    m.packed("no rows here, no keys there", [0, 5, 4, 0], [3, 0, 2, 0], 2, 2, 8, return_lse=True)
    m.packed("no tokens", [0, 0], [0, 0], 2, 2, 8, return_lse=True)
    m.packed("no sequences", [], [], 2, 2, 8)
    m.packed("spare tokens", [9, 4], [7, 6], 4, 2, 8, spare=3, return_lse=True)
    m.packed("alibi per sequence", [9, 14], [17, 6], 4, 2, 8, alibi_slopes=m.randn(2, 4).abs(), return_lse=True)
    m.packed("top left", [9, 14], [17, 6], 2, 2, 8, causal="top_left", scale=0.5)
    m.packed("dropout", [9, 14], [17, 6], 2, 2, 8, dropout_p=0.4)
    m.packed("softcap", [9, 14], [17, 6], 2, 2, 8, softcap=2.0, scale=1.0)
    m.packed("many", list(range(1, 40)), list(range(1, 40)), 2, 1, 16, is_causal=True)
    for name, farthest, options in DISTANCES:
        rows, keys, bias = [5, 0, 140, 9], [60, 3, 110, 9], m.table(12, farthest)
        m.packed(f"distances to {farthest} {name}", rows, keys, 12, 6, 16, spare=2, distance_bias=bias, **options)
    for name, options in SINKS.items():
        rows, keys = [5, 0, 70, 9], [60, 3, 40, 0]
        m.packed(f"sinks {name}", rows, keys, 32, 16, 8, spare=2, sinks=m.sinks(32), **options)
    return m.samples


OPERATORS = [
    Operator(
        "scaled_dot_product_attention", functional.scaled_dot_product_attention, _sdpa_samples, plain_sdpa, "attention"
    ),
    Operator("varlen_attention", functional.varlen_attention, _varlen_samples, plain_varlen, node="attention"),
]
