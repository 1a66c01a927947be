"""Relative attention beyond the general laws: Hugging Face's XLNet layer, memory, positions, bad input."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmengine
from llmengine.functional import relative_attention
from llmengine.testing import assert_near, targets
from llmengine.testing.samples.relative_attention import permutation

ROOT = Path(__file__).resolve().parent.parent
BATCH, HEADS, HEAD_DIM = 3, 2, 8
# the reference in float64; kernels in float32
BACKENDS = {"reference": (torch.float64, 1e-9)} | {t.backend: (torch.float32, 2e-5) for t in targets()}
BACKENDS = {
    name: how
    for name, how in BACKENDS.items()
    if "relative_attention_forward" in llmengine.ops.registry.load(name).kernels
}


@dataclass
class Case:
    """A layer of Hugging Face's XLNet with random weights, and what one batch gives it."""

    layer: torch.nn.Module
    tokens: int
    memory: int
    targets: int
    segments: bool
    causal: bool
    generator: torch.Generator

    @classmethod
    def make(cls, tokens: int, memory: int, targets: int, segments: bool, causal: bool, dtype: torch.dtype) -> Case:
        from transformers import XLNetConfig
        from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

        width = HEADS * HEAD_DIM
        layer = XLNetRelativeAttention(XLNetConfig(d_model=width, n_head=HEADS, d_head=HEAD_DIM, dropout=0.0))
        generator = torch.Generator().manual_seed(tokens)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
        return cls(layer.to(dtype), tokens, memory, targets, segments, causal, generator)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.layer.q.dtype)

    def draw(self) -> None:
        keys = self.memory + self.tokens
        drawn = [permutation(self.generator, self.tokens, self.targets, self.memory) for _ in range(BATCH)]
        self.key_ranks, self.places = (torch.stack(x) for x in zip(*drawn, strict=True))  # (batch, ..)
        self.h = self.randn(self.tokens, BATCH, HEADS * HEAD_DIM).requires_grad_()
        self.g = self.randn(self.targets, BATCH, HEADS * HEAD_DIM).requires_grad_()
        self.mems = self.randn(self.memory, BATCH, HEADS * HEAD_DIM).requires_grad_()
        # the encoding of a distance is arbitrary here: its projection is the layer's
        self.encoding = self.randn(keys + self.tokens, HEADS * HEAD_DIM)  # distances 1 - tokens ... keys
        self.segment = torch.randint(2, (BATCH, self.tokens), generator=self.generator)

    def hugging_face(self) -> tuple[Tensor, Tensor]:
        """Its layer, given masks, one-hot targets and segments, and encodings from the largest distance on."""
        rank = self.key_ranks[:, self.memory :]
        own = rank.clamp(min=0)
        masked = ~(rank[:, None, :] < own[:, :, None])  # (batch, row, key)
        if self.causal:
            masked |= torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1)
        masked = masked.permute(1, 2, 0)
        masked = torch.cat([masked.new_zeros(self.tokens, self.memory, BATCH), masked], dim=1)
        oneself = torch.eye(self.tokens, dtype=torch.bool)
        oneself = torch.cat([oneself.new_zeros(self.tokens, self.memory), oneself], dim=1)[:, :, None]
        dtype = self.h.dtype
        mapping = torch.nn.functional.one_hot(self.places.long() - self.memory, self.tokens)  # (batch, target, token)
        segments = None
        if self.segments:
            of_keys = torch.cat([self.segment.new_zeros(BATCH, self.memory), self.segment], dim=1)
            other = (self.segment[:, :, None] != of_keys[:, None, :]).long()
            segments = torch.nn.functional.one_hot(other, 2).permute(1, 2, 0, 3).to(dtype)
        r = self.encoding.flip(0)[:, None].expand(-1, BATCH, -1)
        output_h, output_g = self.layer(
            self.h, self.g, (masked & ~oneself)[..., None].to(dtype), masked[..., None].to(dtype), r, segments,
            mems=self.mems, target_mapping=mapping.permute(1, 2, 0).to(dtype),
        )  # fmt: skip
        return output_h, output_g

    def ours(self) -> tuple[Tensor, Tensor]:
        layer, keys = self.layer, self.memory + self.tokens
        stream = torch.cat([self.mems, self.h]).transpose(0, 1).flatten(0, 1)  # packed: (batch x keys, width)
        key, value = (torch.einsum("td,dhe->the", stream, w) for w in (layer.k, layer.v))
        options = {"zero_distance": self.tokens - 1, "is_causal": self.causal, "key_ranks": self.key_ranks.flatten()}
        if self.segments:
            of_keys = torch.cat([self.segment.new_zeros(BATCH, self.memory), self.segment], dim=1)
            options |= {"segment_bias": layer.r_s_bias, "segment_key": layer.seg_embed}
            options["key_segments"] = of_keys.flatten().int()
        position_key = torch.einsum("rd,dhe->rhe", self.encoding, layer.r)

        def run(x: Tensor, segment: Tensor, **more) -> Tensor:
            rows = x.shape[0]
            query = torch.einsum("td,dhe->the", x.transpose(0, 1).flatten(0, 1), layer.q)
            if self.segments:
                more["query_segments"] = segment.flatten().int()
            cu_q, cu_k = (torch.arange(BATCH + 1, dtype=torch.int32) * n for n in (rows, keys))
            attended = relative_attention(
                query, key, value, position_key, layer.r_w_bias, layer.r_r_bias, cu_q, cu_k, rows, keys, **options,
                **more,
            )  # fmt: skip
            return layer.post_attention(x, attended.unflatten(0, (BATCH, rows)).transpose(0, 1))

        own = self.key_ranks[:, self.memory :].clamp(min=0)
        at = self.places.long() - self.memory
        h = run(self.h, self.segment, query_ranks=own.flatten(), include_self=True)
        g = run(
            self.g, self.segment.gather(1, at), query_ranks=own.gather(1, at).flatten(),
            query_positions=self.places.flatten(),
        )  # fmt: skip
        return h, g


SHAPES = {
    "short": (9, 0, 4), "memory": (9, 5, 4), "one target": (6, 11, 1), "all are targets": (7, 3, 7),
    "several tiles": (130, 70, 40),
}  # fmt: skip


@pytest.mark.parametrize("segments, causal", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_streams_of_hugging_face_xlnet(backend: str, shape: str, segments: bool, causal: bool):
    """Outputs and the gradients of both streams, the memory and all of the layer's weights.

    Every row sees a key here: where none is seen Hugging Face gives the mean of all values, and the engine 0."""
    if backend == "triton" and shape == "several tiles" and not segments:
        shape = "memory"  # interpreted
    dtype, tolerance = BACKENDS[backend]
    case = Case.make(*SHAPES[shape], segments, causal, dtype)
    case.draw()
    leaves = {"h": case.h, "g": case.g, "mems": case.mems, **dict(case.layer.named_parameters())}
    upstream = [case.randn(*x.shape) for x in (case.h, case.g)]
    theirs = case.hugging_face()
    of_theirs = torch.autograd.grad(theirs, list(leaves.values()), upstream, allow_unused=True)
    with llmengine.backend(backend):
        ours = case.ours()
        of_ours = torch.autograd.grad(ours, list(leaves.values()), upstream, allow_unused=True)
    for name, a, b in zip("hg", ours, theirs, strict=True):
        assert_near(a, b, tolerance, name)
    for name, a, b in zip(leaves, of_ours, of_theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert_near(a, b, 5 * tolerance, f"grad {name}")
    assert (of_ours[list(leaves).index("seg_embed")] is not None) == segments


# ---- what the operator promises --------------------------------------------------------------------------------------


def call(lengths=((9, 14), (5, 5)), dtype=torch.float32, **options) -> dict:
    rows, keys = zip(*lengths, strict=True)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (rows, keys))
    g = torch.Generator().manual_seed(0)
    names = {"query": sum(rows), "key": sum(keys), "value": sum(keys), "position_key": max(rows) - 1 + max(keys)}
    tensors = {name: torch.randn(n, HEADS, HEAD_DIM, generator=g).to(dtype) for name, n in names.items()}
    biases = {n: torch.randn(HEADS, HEAD_DIM, generator=g).to(dtype) for n in ("content_bias", "position_bias")}
    more = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max(rows), "max_seqlen_k": max(keys)}
    return {**tensors, **biases, **more, "zero_distance": max(rows) - 1, **options}


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_their_own_positions_are_the_default(backend: str):
    arguments = call()
    positions = torch.cat([torch.arange(5, 14), torch.arange(5)]).int()
    with llmengine.backend(backend):
        assert torch.equal(relative_attention(**arguments), relative_attention(**arguments, query_positions=positions))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selection_of_rows_gives_those_rows(backend: str):
    """What the query stream relies on: a row's result depends on its position, not on its place."""
    arguments = call()
    chosen = torch.tensor([7, 0, 3])
    with llmengine.backend(backend):
        everything = relative_attention(**arguments)
        arguments |= {"query": arguments["query"][chosen], "max_seqlen_q": 3}
        arguments["cu_seqlens_q"] = torch.tensor([0, 3, 3], dtype=torch.int32)
        some = relative_attention(**arguments, query_positions=(chosen + 5).int())
    torch.testing.assert_close(some, everything[chosen])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_row_may_not_see_changes_nothing(backend: str):
    """Key by key of the first sequence: the rows that change are those that its rank lets see it."""
    ranks = torch.tensor([-1] * 5 + [2, -1, 0, 1, 3, -1, 4, 5, -1] + [0, 1, 2, 3, 4]).int()
    own = torch.cat([ranks[5:14], ranks[14:]]).clamp(min=0)
    arguments = call(query_ranks=own, key_ranks=ranks)
    with llmengine.backend(backend):
        before = relative_attention(**arguments)
        for key in range(14):
            other = {name: arguments[name].clone() for name in ("key", "value")}
            other["key"][key] += 1.0
            other["value"][key] += 1.0
            changed = (relative_attention(**arguments | other) != before).flatten(1).any(1)
            assert torch.equal(changed[:9], ranks[key] < own[:9])
            assert not changed[9:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_causality_needs_no_distances_below_zero(backend: str):
    arguments = call(is_causal=True)
    with llmengine.backend(backend):
        expected = relative_attention(**arguments)
        arguments["position_key"] = arguments["position_key"][arguments["zero_distance"] :]
        assert torch.equal(relative_attention(**arguments | {"zero_distance": 0}), expected)


@pytest.mark.parametrize("lengths", [((300, 300),), ((40, 90), (5, 5), (130, 200), (1, 1))], ids=["one", "several"])
def test_thread_counts_change_no_bit(lengths):
    """The rows of the one sequence are shared out among tasks; the gradients of positions are sums over sequences."""
    tokens, keys = (sum(x) for x in zip(*lengths, strict=True))
    segments = {"segment_bias": torch.randn(HEADS, HEAD_DIM), "segment_key": torch.randn(2, HEADS, HEAD_DIM)}
    numbers = {"query_segments": torch.arange(tokens).int() % 3, "key_segments": torch.arange(keys).int() % 2}
    arguments = call(lengths, dropout_p=0.1, **segments, **numbers)
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
    grad, results, threads = torch.randn(tokens, HEADS, HEAD_DIM), [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            torch.manual_seed(7)
            with llmengine.backend("cpu"):
                output = relative_attention(**arguments)
                results.append([output, *torch.autograd.grad(output, leaves, grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_linear_in_the_length():
    """One score matrix of this call would take 1 GiB, its position scores twice that. What grows are the sums of 17
    tasks, of which each reaches all keys and distances: 68 MiB."""
    script = """
import torch
from llmengine.functional import relative_attention
torch.set_num_threads(2)
def run(length):
    q, k, v = (torch.randn(length, 1, 4, requires_grad=True) for _ in range(3))
    r = torch.randn(2 * length - 1, 1, 4, requires_grad=True)
    cu = torch.tensor([0, length], dtype=torch.int32)
    bias = torch.zeros(1, 4, requires_grad=True)
    output = relative_attention(q, k, v, r, bias, bias, cu, cu, length, length, zero_distance=length - 1)
    output.sum().backward()
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss is also the parent's
small = run(1024)
print(run(16384) - small)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(out.stdout) < 80 << 10, f"{out.stdout.strip()} KiB more"


@pytest.mark.parametrize("argument", ["query", "key", "value", "position_key"])
def test_offsets_beyond_2_to_the_31(argument: str):
    arguments = call(((5, 5),))
    shape = arguments[argument].shape
    stride = 2**31 // (shape[0] - 1) + 8
    storage = torch.empty(stride * (shape[0] - 1) + shape[1] * shape[2])
    far = storage.as_strided(shape, (stride, shape[2], 1)).copy_(arguments[argument])
    with llmengine.backend("cpu"):
        expected = relative_attention(**arguments)
        torch.testing.assert_close(relative_attention(**arguments | {argument: far}), expected)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


TOKENS = torch.zeros(14, dtype=torch.int32)
ERRORS = {
    "no tensor": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "integers": ({"position_key": torch.ones(22, 2, 8).int()}, ValueError, "position_key has dtype int32; allowed"),
    "two dtypes": ({"value": torch.randn(19, 2, 8).bfloat16()}, ValueError, "value has dtype bfloat16 but query has"),
    "dimensions": ({"key": torch.randn(1, 19, 2, 8)}, ValueError, r"key has shape \(1, 19, 2, 8\); expected \(tokens"),
    "heads": ({"key": torch.randn(19, 1, 8)}, ValueError, r"key has shape \(19, 1, 8\); expected \(.., 2, 8\)"),
    "tokens": ({"value": torch.randn(18, 2, 8)}, ValueError, r"value has shape \(18, 2, 8\); expected \(19, 2"),
    "bias": ({"content_bias": torch.randn(2, 9)}, ValueError, r"content_bias has shape \(2, 9\); expected \(2, 8\)"),
    "cover": ({"zero_distance": 7}, ValueError, r"position_key covers the distances -7 to 14 .* need -8 to 13"),
    "cover above": ({"zero_distance": 9}, ValueError, "position_key covers the distances -9 to 12 .* need -8 to 13"),
    "positions": (
        {"query_positions": TOKENS + 14}, ValueError,
        "position_key covers the distances -8 to 13 .*, but sequence 0 has 1 to 14",
    ),
    "positions dtype": ({"query_positions": TOKENS.long()}, ValueError, r"query_positions must be int32 of shape \(14"),
    "one rank": ({"query_ranks": TOKENS}, ValueError, "query_ranks and key_ranks go together"),
    "ranks": (
        {"query_ranks": TOKENS, "key_ranks": TOKENS}, ValueError, r"key_ranks must be int32 of shape \(19,\), got",
    ),
    "segments": ({"segment_bias": torch.randn(2, 8)}, ValueError, "go together; segment_key, query_segments, key_"),
    "boundaries": ({"cu_seqlens_k": ints(0, 14, 20)}, ValueError, "cu_seqlens_k .*20"),
    "boundaries dtype": ({"cu_seqlens_q": ints(0, 9, 14, dtype=torch.int64)}, ValueError, "cu_seqlens_q must be int32"),
    "maximum": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
    "longer": ({"max_seqlen_k": 13}, ValueError, "cu_seqlens_k gives sequence 0 14 tokens, above its maximum 13"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    "scale": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named(case: str, backend: str):
    changes, error, message = ERRORS[case]
    with llmengine.backend(backend), pytest.raises(error, match=f"relative_attention: .*{message}"):
        relative_attention(**(call() | changes))
