"""Whole training steps and the memory that they take: ours in float32, under autocast and with bf16 weights beside fp32
masters, against Hugging Face's model on PyTorch in float32, under autocast and in bf16 alone, each eager or compiled.

    python benchmarks/training_steps.py --family gpt2 --batch 4 256 --results steps.json      all but the compiled
    ... --contenders llmengine-bf16 torch-bf16 torch-bf16-compiled

`bench_training_step.py` times by turns; here every contender has a process of its own, so that its peak of memory is no
other's: what is resident at most during the steps, less what was before the model was made. A result joins those that
its file has. Random weights and batches without padding, dropout off, fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_training_step import batches, config_of

import llmengine
from llmengine.roofline import machine

MODES = ("fp32", "autocast", "bf16")
CONTENDERS = [f"{engine}-{mode}" for engine in ("llmengine", "torch") for mode in MODES]
COMPILED = [f"torch-{mode}-compiled" for mode in MODES]


def status(field: str) -> float:
    """A field of this process's status in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def make(contender: str, family: str, batch: int, length: int):
    """The model, its optimizer and its inputs."""
    engine, mode, *_ = contender.split("-")
    config = config_of(family, "base")
    ours, theirs = batches(family, config.vocab_size, batch, length)
    if engine == "llmengine":
        model = llmengine.Transformer(config)
        model.to(torch.bfloat16 if mode == "bf16" else torch.float32)
        return model, llmengine.optim.AdamW(model.parameters(), lr=1e-4, master_weights=mode == "bf16"), ours
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        llmengine.Transformer(config).save_pretrained(folder)
        (architecture,) = json.loads(Path(folder, "config.json").read_text())["architectures"]
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        model = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), theirs


def measure(contender: str, family: str, batch: int, length: int, steps: int) -> dict:
    torch.manual_seed(0)
    before = status("VmRSS")
    model, optimizer, inputs = make(contender, family, batch, length)
    call = torch.compile(model.train()) if contender.endswith("compiled") else model.train()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading
    times = []
    for _ in range(steps + 1):  # the first compiles, and makes the moments
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in contender):
            loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "case": f"{family}-{batch}x{length}", "contender": contender, "ms": statistics.median(times[1:]),
        "ms_of_each_step": times[1:], "peak_mib": status("VmHWM") - before, "loss": loss.item(), "machine": machine(),
    }  # fmt: skip


def join(results: Path, row: dict) -> None:
    known = json.loads(results.read_text()) if results.exists() else {"rows": []}
    others = [r for r in known["rows"] if (r["case"], r["contender"]) != (row["case"], row["contender"])]
    results.write_text(json.dumps(known | {"rows": [*others, row]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt2", choices=("gpt2", "bert"))
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 256), metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS + COMPILED)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # this process measures
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.contenders[0], args.family, *args.batch, args.steps)))
        return
    for contender in args.contenders:
        command = [sys.executable, __file__, "--alone", "--family", args.family, "--batch", *map(str, args.batch)]
        command += ["--steps", str(args.steps), "--contenders", contender]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{row['case']:16} {contender:24} {row['ms']:8.0f} ms {row['peak_mib']:8.0f} MiB", flush=True)
        if args.results:
            join(args.results, row)


if __name__ == "__main__":
    main()
