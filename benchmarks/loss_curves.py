"""Whether a run learns the same in float32, under autocast and with bf16 weights beside float32 masters: the examples'
runs, cut short, of one seed in each precision, and in float32 of a second seed as a yardstick.

    python benchmarks/loss_curves.py --results benchmarks/results/cpu_loss_curves      .json and .png

How far two curves lie apart is the largest difference of their smoothed losses after the learning rate has warmed up:
batches are the same in all precisions, so that it is rounding's alone; the second seed has other weights and batches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from llmengine.roofline import machine
from llmengine.training import Observer, RunConfig, train
from llmengine.training.plot import smoothed

EXAMPLES = Path(__file__).parents[1] / "examples"
CURVES = {
    "fp32": ("fp32", 0), "autocast": ("bf16", 0), "bf16": ("fp32", 0), "fp32, another seed": ("fp32", 1),
}  # fmt: skip
"""The run's precision, and what is added to its seed. bf16's is its weights' own (`Listener`)."""


class Listener(Observer):
    """Keeps the losses; in the curve "bf16" it first makes the weights 16-bit, and has the optimizer keep masters."""

    def __init__(self, curve: str) -> None:
        self.curve, self.losses, self.held_out = curve, [], {}

    def started(self, run, step, records) -> None:
        if self.curve == "bf16":
            run.model.to(torch.bfloat16)
            for group in run.optimizer.param_groups:
                group["master_weights"] = True

    def recorded(self, run, record) -> None:
        if record["kind"] == "train":
            self.losses.append(record["loss"])
        else:
            self.held_out = record["losses"]


def curve(config: Path, name: str, steps: int, overrides: list[str]) -> Listener:
    precision, seed = CURVES[name]
    listener = Listener(name)
    given = RunConfig.from_file(config, overrides)
    changes = [f"steps={steps}", f"precision={precision}", f"seed={given.seed + seed}"]
    changes += ["every.log=1", f"every.evaluate={steps}", f"every.save={steps}", "device=cpu"]
    with tempfile.TemporaryDirectory() as folder:
        train(RunConfig.from_file(config, [*overrides, *changes]), Path(folder, "run"), observers=[listener])
    return listener


def apart(losses: list[float], others: list[float], warmup: int) -> float:
    """The largest difference of two smoothed curves, from step `warmup` on."""
    pairs = zip(smoothed(losses), smoothed(others), strict=True)
    return max(abs(a - b) for a, b in list(pairs)[warmup:])


def compare(config: Path, steps: int, overrides: list[str]) -> dict:
    """The curves of one example, and how far each lies from that in float32."""
    warmup = RunConfig.from_file(config, [*overrides, f"steps={steps}"]).schedule.warmup
    listeners = {name: curve(config, name, steps, overrides) for name in CURVES}
    base = listeners["fp32"].losses
    return {
        "config": config.name, "steps": steps, "warmup": warmup,
        "apart": {name: apart(of.losses, base, warmup) for name, of in listeners.items() if name != "fp32"},
        "held_out": {name: of.held_out for name, of in listeners.items()},
        "losses": {name: [round(loss, 5) for loss in of.losses] for name, of in listeners.items()},
    }  # fmt: skip


def draw(compared: list[dict], path: Path) -> None:
    """Smoothed losses, and below them their differences from float32's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(compared), 6), layout="constrained")
    panels = figure.subplots(2, len(compared), sharex="col", squeeze=False, height_ratios=[2, 1])
    for (above, below), case in zip(panels.T, compared, strict=True):
        base = smoothed(case["losses"]["fp32"])
        for name, losses in case["losses"].items():
            look = {"label": name, "linewidth": 1.2, "linestyle": ":" if "seed" in name else "-"}
            line = smoothed(losses)
            above.plot(range(1, len(line) + 1), line, **look)
            below.plot(range(1, len(line) + 1), [a - b for a, b in zip(line, base, strict=True)], **look)
        above.set_title(case["config"])
        above.set_ylabel("smoothed loss")
        above.legend()
        below.set_ylabel("less that in fp32")
        below.set_xlabel("step")
        for panel in (above, below):
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = [EXAMPLES / f"train_{family}.yaml" for family in ("gpt", "bert")]
    parser.add_argument("--configs", type=Path, nargs="+", default=configs)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the configs")
    parser.add_argument("--results", type=Path, required=True, help="without an ending")
    args = parser.parse_args(arguments)
    compared = []
    for config in args.configs:
        compared.append(compare(config, args.steps, args.set))
        print(config.name, {name: round(value, 4) for name, value in compared[-1]["apart"].items()}, flush=True)
        report = {"machine": machine(), "threads": torch.get_num_threads(), "curves": compared}
        args.results.with_suffix(".json").write_text(json.dumps(report) + "\n")
        draw(compared, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
