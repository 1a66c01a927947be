"""confusion.png: which classes are taken for which."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmengine.files import replace_bytes
from llmengine.metrics import Confusion

FILE = "confusion.png"
NUMBERED, NAMED = 20, 60  # the most classes whose cells have numbers, whose rows have names
# Where the usual font lacks a character: fonts that have Chinese, Japanese and Korean ones, on the usual systems
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip


def draw(confusion: Confusion, path: Path) -> None:
    """A square per pair of classes, as dark as its share of the rows of the true class. Replaced whole or not at all.

    Labels that no font here can write are replaced by their numbers, from 1.
    """
    # a figure of its own, not pyplot's: no display, and none of the caller's figures are touched
    from matplotlib.figure import Figure

    classes = len(confusion.labels)
    size = min(3.0 + 0.45 * classes, 14.0)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = confusion.counts / np.maximum(confusion.counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the label's rows")
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if classes <= NAMED:
        names, families = _writable([_short(label) for label in confusion.labels])
        axes.set_xticks(range(classes), names, rotation=45, ha="right", rotation_mode="anchor", fontfamily=families)
        axes.set_yticks(range(classes), names, fontfamily=families)
    if classes <= NUMBERED:
        _write_counts(axes, confusion.counts, shares)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    replace_bytes(path, picture.getvalue())


def _write_counts(axes: Any, counts: np.ndarray, shares: np.ndarray) -> None:
    for i, j in np.ndindex(*counts.shape):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=8)


def _short(label: str) -> str:
    """As it is shown: not too long, and without what would begin a formula."""
    return (label if len(label) <= 24 else label[:23] + "…").replace("$", r"\$")


def _writable(names: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """Names, and the fonts that they are written in."""
    from matplotlib import font_manager

    usual = font_manager.findfont("DejaVu Sans")
    known = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    here = {"DejaVu Sans": usual} | {name: known[name] for name in FONTS if name in known}
    faces = [font_manager.get_font(file) for file in here.values()]
    if all(any(face.get_char_index(ord(c)) for face in faces) for name in names for c in name):
        return names, list(here)
    return [str(i + 1) for i in range(len(names))], ["DejaVu Sans"]
