"""The roofline as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmengine.files import replace_bytes
from llmengine.roofline.cases import BOTH
from llmengine.roofline.ceilings import NAMES, Ceilings
from llmengine.roofline.measure import Row


def draw(rows: Sequence[Row], ceilings: Ceilings, path: Path, title: str = "") -> None:
    """A PNG of two panels: percent of the limit by case and peer, forward + backward, or forward where no case has
    more; and the roofline itself, GFLOP/s over operations per byte, with the cases that multiply. The file is replaced
    whole or not at all."""
    from matplotlib.figure import Figure

    right = [row for row in rows if "error" not in row]
    timed = [row for row in right if row["pass"] != "forward"] or right
    if not timed:
        return
    count = len({_case(row) for row in timed})
    figure = Figure(figsize=(15, max(4.5, 0.42 * count + 1.5)), layout="constrained")
    figure.suptitle(title)
    bars, roof = figure.subplots(1, 2, width_ratios=[3, 2])
    _bars(bars, timed)
    _roof(roof, [row for row in timed if row["tflops"]], ceilings)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    replace_bytes(path, image.getvalue())


def _case(row: Row) -> str:
    return f"{row['operator']} {row['case']} {row['dtype']}"


def _peers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in rows))


def _bars(panel: Any, rows: Sequence[Row]) -> None:
    names, peers = list(dict.fromkeys(map(_case, rows))), _peers(rows)
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        percent = {_case(row): row["percent"] for row in rows if row["peer"] == peer}
        places = [j + (i - (len(peers) - 1) / 2) * height for j in range(len(names))]
        panel.barh(places, [percent.get(name, 0.0) for name in names], height, label=peer)
    panel.axvline(100, color="black", linewidth=0.8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(f"% of the measured limit, {BOTH} (above 100: from the cache)")
    panel.legend(fontsize=8)


def _roof(panel: Any, rows: Sequence[Row], ceilings: Ceilings) -> None:
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="roofline")
    right = 10 * max([row["intensity"] for row in rows] + [max(ceilings.tflops.values()) * 1e3 / ceilings.gbytes_per_s])
    for i, (dtype, peak) in enumerate(ceilings.tflops.items()):
        ridge = peak * 1e3 / ceilings.gbytes_per_s
        x = [1.0, ridge, right]
        y = [ceilings.gbytes_per_s / 1e3, peak, peak]
        panel.plot(x, y, color="black", linestyle=("-", "--", ":")[i % 3], linewidth=1, label=f"{NAMES[dtype]} roof")
    for i, peer in enumerate(_peers(rows)):
        points = [row for row in rows if row["peer"] == peer]
        x, y = [row["intensity"] for row in points], [row["tflops"] for row in points]
        panel.plot(x, y, "osD^v"[i % 5], markersize=6, alpha=0.7, label=peer)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
