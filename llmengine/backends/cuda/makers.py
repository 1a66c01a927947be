"""Who was measured to be quickest at the products of a call, of cuBLAS and our two cores: a `bench.json` that
`llmengine bench linear ffn --dtype bf16` wrote on this GPU, which LLMENGINE_CUDA_PRODUCTS names.

Its rows are of a layer's two sizes and some number of tokens. A call has the makers' times at its own sizes and the
nearest number of tokens (nearest by ratio); layers that were not measured are cuBLAS's, whatever their like may say.
The times of a backward are those of both passes less the forward's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmengine.files import read_json

PEERS = {"llmengine": "blas", "llmengine cuda sm80": "sm80", "llmengine cuda sm90a": "sm90a"}  # of the bench
DTYPES = {torch.bfloat16: "bf16"}  # that it measures
FORWARD, BOTH = "forward", "forward + backward"

Times = Mapping[str, float]  # milliseconds by maker


@dataclass(frozen=True)
class Layer:
    operator: str  # "linear" or "ffn", ungated
    dtype: str
    sizes: tuple[int, int]  # of input and output, or of input and hidden layer


def is_table(setting: str) -> bool:
    return setting.endswith(".json")


def quickest(path: str, device: str, layer: Layer, backward: bool, tokens: int) -> tuple[str, str]:
    """(maker, why) of a call."""
    which = "backward" if backward else "forward"
    what = f"{layer.operator} {which} of {layer.dtype}, {layer.sizes[0]} to {layer.sizes[1]}"
    by_tokens = _table(path, device).get((layer, backward))
    if not by_tokens:
        return "blas", f"{path} has no {what}"
    nearest = min(by_tokens, key=lambda measured: abs(math.log(measured / max(tokens, 1))))
    times = by_tokens[nearest]
    told = ", ".join(f"{maker} {ms:.3f} ms" for maker, ms in sorted(times.items(), key=lambda item: item[1]))
    return min(times, key=times.__getitem__), f"{what}, at {nearest} tokens: {told}"


@functools.cache
def _table(path: str, device: str) -> dict[tuple[Layer, bool], dict[int, Times]]:
    """{(layer, backward): {tokens: times}}. Raises ValueError where the file is of no use here."""
    record = read_json(Path(path), "measured products")
    machine, rows = record.get("machine", {}), record.get("rows")
    if not isinstance(rows, list) or not isinstance(machine, dict):
        raise ValueError(f"measured products: {path} is no bench.json: it has no rows, or no machine")
    if machine.get("device") != device:
        raise ValueError(f"measured products: {path} was made on {machine.get('device')!r}; here it is {device!r}")
    if (made_by := machine.get("products", "blas")) != "blas":
        raise ValueError(
            f"measured products: {path}: its rows 'llmengine' are of products by {made_by!r}; expected 'blas'"
        )
    passes: dict[tuple[Layer, int, str], dict[str, float]] = {}
    for row in rows:
        if (place := _place(row)) is not None:
            passes.setdefault(place, {})[PEERS[row["peer"]]] = float(row["ms"])
    table: dict[tuple[Layer, bool], dict[int, Times]] = {}
    for (layer, tokens, which), times in passes.items():
        if which == FORWARD:
            table.setdefault((layer, False), {})[tokens] = times
        elif forward := passes.get((layer, tokens, FORWARD)):
            alone = {maker: ms - forward[maker] for maker, ms in times.items() if maker in forward}
            table.setdefault((layer, True), {})[tokens] = alone
    return {
        key: {tokens: times for tokens, times in of.items() if len(times) > 1 and "blas" in times}
        for key, of in table.items()
    }


def _place(row: Any) -> tuple[Layer, int, str] | None:
    """Of a row that measured products: its layer, its tokens, its pass."""
    if not isinstance(row, dict) or "ms" not in row:
        return None
    operator, peer, which = (row.get(key) for key in ("operator", "peer", "pass"))
    if operator not in ("linear", "ffn") or peer not in PEERS or which not in (FORWARD, BOTH):
        return None
    tokens, first, second = map(int, row["case"].split("x"))
    return Layer(operator, row["dtype"], (first, second)), tokens, which


def forget() -> None:
    """Files are read anew."""
    _table.cache_clear()
