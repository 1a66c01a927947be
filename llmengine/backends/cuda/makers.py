"""Who was measured to be quickest at the products of a call, of cuBLAS and our two cores: a file that
LLMENGINE_CUDA_PRODUCTS names, which `llmengine bench linear ffn gated_ffn linear_cross_entropy --dtype bf16 --dtype
fp16` or benchmarks/gpu_suite.py wrote on this GPU.

Its rows are of a layer's two sizes and some number of tokens. A call has the makers' times at its own sizes and the
nearest number of tokens (nearest by ratio); layers that were not measured are cuBLAS's, whatever their like may say.
The times of a backward are those of both passes less the forward's. Linear cross-entropy is made by our cores alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmengine.files import read_json

PEERS = {  # of the bench; of the suite, which times backends one by one, the second
    "llmengine": "blas", "llmengine cuda": "blas", "llmengine cuda sm80": "sm80", "llmengine cuda sm90a": "sm90a",
}  # fmt: skip
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
WITHOUT_BLAS = "linear_cross_entropy"
OPERATORS = ("linear", "ffn", "gated_ffn", WITHOUT_BLAS)
FORWARD, BOTH = "forward", "forward + backward"
SIZES = re.compile(r"(\d+)x(\d+)x(\d+)( .+)?")  # of a case; with a word behind them it has options

Times = Mapping[str, float]  # milliseconds by maker


@dataclass(frozen=True)
class Layer:
    operator: str
    dtype: str
    sizes: tuple[int, int]  # of input and output, hidden layer or classes


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
    try:
        record = read_json(Path(path), "measured products")
    except OSError as error:
        raise type(error)(f"measured products: {path} cannot be read: {error.strerror}") from None
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
    for number, row in enumerate(rows):
        try:
            found = _measured(row)
        except ValueError as error:
            raise ValueError(f"measured products: {path}: row {number} {error}") from None
        if found is not None:
            place, maker, ms = found
            passes.setdefault(place, {})[maker] = ms
    table: dict[tuple[Layer, bool], dict[int, Times]] = {}
    for (layer, tokens, which), times in passes.items():
        if which == FORWARD:
            table.setdefault((layer, False), {})[tokens] = times
        elif forward := passes.get((layer, tokens, FORWARD)):
            alone = {maker: ms - forward[maker] for maker, ms in times.items() if maker in forward}
            table.setdefault((layer, True), {})[tokens] = alone
    return {
        key: {tokens: times for tokens, times in of.items() if _decides(key[0], times)} for key, of in table.items()
    }


def _decides(layer: Layer, times: Times) -> bool:
    """Whether whoever would run without the table was measured, and another beside."""
    return len(times) > 1 and ("blas" in times or layer.operator == WITHOUT_BLAS)


def _measured(row: Any) -> tuple[tuple[Layer, int, str], str, float] | None:
    """Of a row that measured products of ours: (layer, tokens, pass), the maker, milliseconds. Raises ValueError, what
    is wrong with the row."""
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}; expected an object")
    operator, dtype, which, peer = (str(row.get(key)) for key in ("operator", "dtype", "pass", "peer"))
    maker = PEERS.get(peer)
    if maker is None or operator not in OPERATORS or dtype not in DTYPES.values() or which not in (FORWARD, BOTH):
        return None
    if "ms" not in row or (operator == WITHOUT_BLAS and maker == "blas"):
        return None
    case, ms = row.get("case"), row["ms"]
    sizes = SIZES.fullmatch(case) if isinstance(case, str) else None
    if sizes is None:
        raise ValueError(f"has the case {case!r}; expected tokens and two sizes, as '8192x4096x16384'")
    if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 < ms < math.inf:
        raise ValueError(f"has {ms!r} ms; expected a time")
    if sizes[4] is not None:
        return None
    return (Layer(operator, dtype, (int(sizes[2]), int(sizes[3]))), int(sizes[1]), which), maker, float(ms)


def forget() -> None:
    """Files are read anew."""
    _table.cache_clear()
