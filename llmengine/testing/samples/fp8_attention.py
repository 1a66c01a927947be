"""Cases of attention with products of 8-bit floats: whom rows see, heads that are shared, packed sequences, sinks,
outliers, values narrower than keys, empty tensors."""

from __future__ import annotations

from typing import Any

from llmengine import functional
from llmengine.testing.sample import Operator, Sample
from llmengine.testing.samples.attention import CAUSAL, EMPTY, _Maker

CONSTANTS = (0, 1, 2, "sinks")


class _Maker8(_Maker):
    def add(self, name, args, **options):
        self.samples.append(Sample(f"fp8 {name}", args, {"fp8": True} | options, CONSTANTS))


def with_outliers(sample: Sample) -> Sample:
    """A channel of keys that is far off, and single large numbers of all."""
    query, key, value, *_ = sample.args
    key[..., 3] += 20
    for x in (query, key, value):
        x.view(-1)[::97] *= 30
    return sample


def _sdpa_samples() -> list[Sample]:
    m = _Maker8(11)
    for i, (name, options) in enumerate(CAUSAL.items()):
        more: dict[str, Any] = {"return_lse": True} if i % 2 else {"scale": 0.3}
        m.padded(name, 2, 4, 37, 150, 24, key_heads=(1, 2, 4)[i % 3], **options, **more)
    m.padded("more rows than keys", 1, 2, 150, 40, 64, causal="bottom_right", return_lse=True)
    m.padded("tiles", 1, 1, 129, 257, 128, is_causal=True)
    m.padded("wide", 1, 2, 70, 200, 200, 136, return_lse=True)
    m.padded("wide, causal", 1, 1, 140, 150, 256, is_causal=True)
    m.padded("narrow values", 1, 2, 33, 140, 192, 128, causal="bottom_right")
    m.padded("one number", 1, 1, 1, 1, 1, return_lse=True)
    m.padded("sinks", 2, 4, 40, 140, 16, sinks=m.sinks(4), is_causal=True, return_lse=True)
    m.padded("outliers", 1, 2, 60, 140, 64)
    with_outliers(m.samples[-1])
    for sizes in EMPTY:
        m.padded(f"empty {sizes}", *sizes, 8, return_lse=True)
    return m.samples


def _varlen_samples() -> list[Sample]:
    m = _Maker8(12)
    for name, options in CAUSAL.items():
        m.packed(f"{name}", [5, 70, 0, 130], [60, 30, 1, 140], 4, 2, 16, spare=3, **options)
    m.packed("no keys here", [0, 5, 4, 0], [3, 0, 2, 0], 2, 2, 72, return_lse=True)
    m.packed("no sequences", [], [], 2, 2, 8)
    m.packed("many, sinks", list(range(1, 30)), list(range(1, 30)), 2, 1, 16, is_causal=True, sinks=m.sinks(2))
    return m.samples


OPERATORS = [
    Operator(
        "scaled_dot_product_attention",
        functional.scaled_dot_product_attention,
        _sdpa_samples,
        node="fp8_attention",
        inference=True,
    ),
    Operator("varlen_attention", functional.varlen_attention, _varlen_samples, node="fp8_attention", inference=True),
]
