"""Cases of relative attention: every term and mask alone and together, memory, two streams, sizes around tile edges."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine import functional
from llmengine.ops.registry import backend
from llmengine.testing.sample import Operator, Sample


def plain(
    query, key, value, position_key, content_bias, position_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, *, zero_distance, return_lse=False, **options,
):  # fmt: skip
    """The formula in PyTorch's own operators, sequence by sequence, with score matrices and a gather.

    In less than float64 the peer is the reference: it takes delta of a row from output, as kernels must which hold no
    row of scores. PyTorch's softmax, which has the row at hand, errs a little less.
    """
    single = query.dtype != torch.float64 and not torch.is_autocast_enabled("cpu")
    if single or options.get("dropout_p"):  # PyTorch draws other numbers
        with backend("reference"):
            return functional.relative_attention(
                query, key, value, position_key, content_bias, position_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                max_seqlen_k, zero_distance=zero_distance, return_lse=return_lse, **options,
            )  # fmt: skip
    outputs, logs = [], []
    for n in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(int(cu[n]), int(cu[n + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        per_row = ("query_segments", "query_positions", "query_ranks")
        own = {
            name: x[rows if name in per_row else keys] if name.endswith(("segments", "positions", "ranks")) else x
            for name, x in options.items()
        }
        output, lse = _sequence(
            query[rows], key[keys], value[keys], position_key, content_bias, position_bias, zero_distance, **own
        )
        outputs.append(output)
        logs.append(lse)
    spare = query.shape[0] - int(cu_seqlens_q[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    outputs.append((0 * query[query.shape[0] - spare :, :, :1]).expand(-1, -1, value.shape[2]))
    output = torch.cat(outputs).to(outputs[0].dtype)
    if not return_lse:
        return output
    logs.append(torch.full((query.shape[1], spare), -torch.inf, dtype=wide))
    return output, torch.cat(logs, dim=1)


def _sequence(
    query, key, value, position_key, content_bias, position_bias, zero_distance, *, segment_bias=None,
    segment_key=None, query_segments=None, key_segments=None, query_positions=None, query_ranks=None, key_ranks=None,
    include_self=False, is_causal=False, scale=None, dropout_p=0.0,
):  # fmt: skip
    wide = torch.promote_types(query.dtype, torch.float32)

    def biased(bias):
        return (query + bias).to(query.dtype).to(wide)

    k, v, r = (x.to(wide) for x in (key, value, position_key))
    rows, keys = query.shape[0], key.shape[0]
    position = torch.arange(rows) + keys - rows if query_positions is None else query_positions.long()
    distance = position[:, None] - torch.arange(keys)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if query_ranks is not None:
        seen = (key_ranks < query_ranks[:, None]) | (distance == 0 if include_self else seen.new_zeros(()))
    if is_causal:
        seen = seen & (distance >= 0)
    scores = torch.einsum("ihd,jhd->hij", biased(content_bias), k)
    of_distances = torch.einsum("ihd,chd->hic", biased(position_bias), r)
    place = (distance.clamp(min=0) if is_causal else distance) + zero_distance
    scores = scores + of_distances.gather(2, place.expand(query.shape[1], -1, -1))
    if segment_key is not None:
        of_segments = torch.einsum("ihd,shd->hsi", biased(segment_bias), segment_key.to(wide))
        other = query_segments[:, None] != key_segments
        scores = scores + torch.where(other, of_segments[:, 1, :, None], of_segments[:, 0, :, None])
    scores = torch.where(seen, scores * (query.shape[2] ** -0.5 if scale is None else scale), -torch.inf)
    some = seen.any(1, keepdim=True)
    scores = torch.where(some, scores, 0.0)  # rows that see nothing, without the NaN of their gradients
    weights = torch.softmax(scores, -1) if keys else scores
    output = torch.where(some, torch.einsum("hij,jhd->hid", weights, v), 0.0).transpose(0, 1)
    low = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
    lse = scores.logsumexp(-1).to(wide) if keys else scores.sum(-1)
    return output.to(low), torch.where(some.squeeze(1), lse, -torch.inf)


def permutation(generator: torch.Generator, tokens: int, targets: int, memory: int = 0) -> tuple[Tensor, Tensor]:
    """(ranks of the keys, positions of the targets): a random order of the targets; all else is seen by all.

    The first token is no target where another can be: every row sees something, also where the call is causal.
    """
    first = 1 if targets < tokens else 0
    chosen = first + torch.randperm(tokens - first, generator=generator)[:targets].sort().values
    ranks = torch.full((memory + tokens,), -1, dtype=torch.int32)
    ranks[memory + chosen] = torch.randperm(targets, generator=generator).int()
    return ranks, (memory + chosen).int()


class _Maker:
    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.samples: list[Sample] = []

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator, dtype=torch.int32)

    def add(self, name, rows, keys, heads, dim, value_dim=None, spare=0, segments=False, margin=0, **options) -> None:
        """`spare` tokens follow the last sequence; `margin`: distances that are covered and not needed."""
        cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (rows, keys))
        tokens, key_tokens = sum(rows) + spare, sum(keys) + spare
        longest_q, longest_k = max([0, *rows]), max([0, *keys])
        before = longest_k if "query_positions" in options else longest_q
        zero = margin + (0 if options.get("is_causal") else max(before - 1, 0))
        if segments:
            options |= {
                "segment_bias": self.randn(heads, dim), "segment_key": self.randn(2, heads, dim),
                "query_segments": self.integers(2, tokens), "key_segments": self.integers(2, key_tokens),
            }  # fmt: skip
        args = (
            self.randn(tokens, heads, dim), self.randn(key_tokens, heads, dim),
            self.randn(key_tokens, heads, value_dim or dim), self.randn(zero + longest_k + margin, heads, dim),
            self.randn(heads, dim), self.randn(heads, dim), cu_q, cu_k, longest_q, longest_k,
        )  # fmt: skip
        self.samples.append(Sample(name, args, {"zero_distance": zero, **options}))

    def ranks(self, rows: int, keys: int, **more) -> dict:
        return {"query_ranks": self.integers(6, rows), "key_ranks": self.integers(6, keys) - 1, **more}

    def streams(self, name: str, tokens: list[int], targets: list[int], memory: int, heads: int, dim: int, **options):
        """XLNet's content stream, and its query stream of the targets alone."""
        drawn = [permutation(self.generator, n, t, memory) for n, t in zip(tokens, targets, strict=True)]
        key_ranks = torch.cat([ranks for ranks, _ in drawn])
        own = torch.cat([ranks[memory:] for ranks, _ in drawn])
        keys = [memory + n for n in tokens]
        self.add(
            f"{name}, content stream", tokens, keys, heads, dim, query_ranks=own.clamp(min=0), key_ranks=key_ranks,
            include_self=True, **options,
        )  # fmt: skip
        self.add(
            f"{name}, query stream", targets, keys, heads, dim, query_positions=torch.cat([p for _, p in drawn]),
            query_ranks=torch.cat([ranks[p.long()] for ranks, p in drawn]), key_ranks=key_ranks, **options,
        )  # fmt: skip


def _samples() -> list[Sample]:
    # The law needs numbers to compare: the biases have heads x head_dim elements, no more.
    m = _Maker(2)
    m.add(
        "everything", [2, 0, 3], [4, 1, 6], 2, 8, 6, segments=True, margin=1, dropout_p=0.2, scale=-0.4,
        return_lse=True, is_causal=True, include_self=True, **m.ranks(5, 11),
    )  # fmt: skip
    for name, rows, keys in [("equal", [5, 70, 33, 1], [5, 70, 33, 1]), ("memory", [5, 40, 33, 8], [60, 41, 40, 8])]:
        m.add(name, rows, keys, 4, 24)
        m.add(f"{name} causal", rows, keys, 4, 24, is_causal=True, return_lse=True)
        m.add(f"{name} segments", rows, keys, 4, 24, segments=True, margin=3)
        m.add(f"{name} dropout", rows, keys, 4, 24, segments=True, dropout_p=0.3)
    for dim, value_dim in [(1, 1), (3, 5), (59, 59), (64, 64), (80, 128), (129, 33), (256, 256)]:
        m.add(f"head_dim {dim} {value_dim}", [35, 60], [50, 60], max(2, 64 // dim), dim, value_dim, is_causal=True)
    m.streams("no memory", [20, 37], [6, 9], 0, 4, 24, segments=True)
    m.streams("memory", [60, 37], [20, 9], 30, 4, 24, segments=True, return_lse=True)
    m.streams("several tiles", [230, 110], [70, 1], 100, 4, 24, dropout_p=0.1)
    # positions in no order, and several rows at one place
    m.add("any positions", [70, 9], [130, 20], 4, 24, query_positions=m.integers(20, 79), return_lse=True)
    far = torch.cat([m.integers(300, 100), m.integers(9, 4)])
    m.add("far positions", [100, 4], [300, 9], 8, 24, query_positions=far, is_causal=True, segments=True)
    m.add("ranks", [40, 33], [60, 40], 4, 24, **m.ranks(73, 100))
    m.add("ranks and self", [40, 33], [60, 40], 4, 24, **m.ranks(73, 100, include_self=True, return_lse=True))
    unseen = torch.zeros(60, dtype=torch.int32)
    m.add("no key is seen", [40], [60], 4, 24, query_ranks=unseen[:40], key_ranks=unseen, return_lse=True)
    m.add("only oneself", [40], [60], 4, 24, query_ranks=unseen[:40], key_ranks=unseen, include_self=True)
    m.add("rows before the keys", [50, 3], [30, 1], 4, 24, is_causal=True, return_lse=True)
    m.add("no tokens", [0, 0], [0, 0], 2, 8, return_lse=True)
    m.add("no sequences", [], [], 2, 8)
    m.add("no rows here, no keys there", [0, 5, 14, 0], [3, 0, 12, 0], 4, 24, return_lse=True)
    m.add("no heads", [3], [4], 0, 8)
    m.add("spare tokens", [9, 14], [7, 16], 4, 24, spare=3, segments=True, return_lse=True)
    m.add("scale 0", [20], [30], 4, 24, scale=0.0)
    m.add("large scores", [40, 40], [90, 90], 4, 32, scale=2.0, is_causal=True, return_lse=True)
    m.add("many", list(range(1, 30)), list(range(1, 30)), 4, 24, is_causal=True)
    m.add("tiles", [300], [500], 4, 24, segments=True, return_lse=True)
    return m.samples


OPERATORS = [Operator("relative_attention", functional.relative_attention, _samples, plain)]
