"""Tiny runs for tests: a corpus of made-up sentences, a two-layer model, and how to stop a run half-way."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import torch

from llmengine.data.batches import Step
from llmengine.training import FinetuneConfig, Observer, Result, RunConfig, train
from llmengine.training import checkpoint as checkpoints

WALL_CLOCK = ("seconds", "tokens_per_second", "flops_per_second")  # what two equal runs differ in


def corpus(directory: Path) -> Path:
    """Sentences that a small model can learn: each subject has its own verb and objects."""
    draw = random.Random(0)
    verbs = {"the cat": "chases", "a dog": "finds", "my aunt": "paints", "the old sailor": "remembers"}
    nouns = ["the mouse", "a stone", "the green door", "seven ships", "an apple"]
    paragraphs = []
    for _ in range(60):
        subjects = draw.choices(list(verbs), k=6)
        paragraphs.append(" ".join(f"{s.capitalize()} {verbs[s]} {draw.choice(nouns)}." for s in subjects))
    path = directory / "corpus.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


def tiny(directory: Path, objective: str = "clm", *overrides: str) -> RunConfig:
    """Eight steps, a checkpoint every third, dropout on; "plm" with memory."""
    shape = {"preset": {"clm": "gpt-tiny", "plm": "xlnet-tiny"}.get(objective, "bert-tiny")}
    shape |= {"d_model": 16, "d_ff": 32, "n_heads": 2}
    options = {"reuse": 12, "memory": 20, "two_segments": True} if objective == "plm" else {}
    return RunConfig.from_dict(
        {
            "corpus": str(corpus(directory)),
            "objective": objective,
            "model": shape if objective == "plm" else shape | {"max_positions": 32},
            "steps": 8,
            "seed": 3,
            "tokenizer": {"vocab_size": 300},
            "data": {"sequence_length": 32, "batch_tokens": 64, "accumulation": 2, "held_out": 0.1, "options": options},
            "optimizer": {"lr": 0.01},
            "every": {"evaluate": 4, "save": 3},
        },
        overrides,
    )


class At(Observer):
    """Does something once step `step` is recorded, and keeps what it is told."""

    def __init__(self, step: int = -1, do=lambda: None) -> None:
        self.step, self.do = step, do
        self.notices: list[str] = []

    def recorded(self, run, record) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            self.do()

    def noticed(self, sentence: str) -> None:
        self.notices.append(sentence)


class Crash(Exception):
    """Stands for whatever ends a process without warning."""


def crash() -> None:
    raise Crash


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)  # os.kill's may reach another thread first, and two of them count as one


def run(
    config: RunConfig | FinetuneConfig, output: Path, step: int = -1, do=lambda: None, *, resume: bool = False
) -> Result:
    return train(config, output, resume=resume, observers=[At(step, do)])


def outcome(output: Path) -> dict[str, Any]:
    """What must be equal bit by bit: every record without its times, and the last checkpoint's bytes by SHA-256."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = checkpoints.paths(output / "checkpoints")[-1]
    files = json.loads((last / checkpoints.MANIFEST).read_text())["files"]
    untimed = [{k: v for k, v in record.items() if k not in WALL_CLOCK} for record in records]
    return {"records": untimed, "checkpoint": last.name, "files": files}


def merged(step: Step) -> Step:
    """The same sequences in one micro-batch."""
    tensors = step.micro_batches[0].keys() - {"cu_seqlens", "max_seqlen"}
    together: dict = {name: torch.cat([batch[name] for batch in step.micro_batches]) for name in tensors}
    lengths = torch.cat([batch["cu_seqlens"].diff() for batch in step.micro_batches])
    together["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    together["max_seqlen"] = int(lengths.max())
    return Step([together], step.items, step.epoch, step.progress)
