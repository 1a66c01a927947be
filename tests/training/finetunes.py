"""Tiny fine-tuning runs for tests: sentences of two classes, a small model, and the least task there can be."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from llmengine import Transformer, TransformerConfig
from llmengine.data.examples import pack
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement, interval
from llmengine.tasks import TASKS, Task, TaskExamples
from llmengine.training import FinetuneConfig

TINY = {"n_layers": 2, "d_model": 16, "d_ff": 32, "n_heads": 2, "max_positions": 32}
GOOD, BAD = ("fine", "lovely", "warm"), ("dull", "awful", "cold")


@dataclass(frozen=True)
class NoOptions:
    pass


class Toy(Task):
    """One class per sentence: [CLS] text [SEP], as BERT reads it."""

    name = "toy"
    objective = "classification"
    columns = {"text": "a sentence", "label": "its class"}  # noqa: RUF012
    asked = ("text",)
    Options = NoOptions

    @classmethod
    def labels_of(cls, rows, options):
        return tuple(sorted({row["label"] for row in rows}))

    def model_fields(self):
        return {"n_labels": len(self.labels)}

    def read(self, row):
        ids = self.tokenizer.encode(row["text"])[: self.max_length - 2]
        return torch.tensor([self.tokenizer.cls_id, *ids, self.tokenizer.sep_id])

    def examples(self, rows, *, seed=0):
        made = [{"input_ids": self.read(r), "labels": torch.tensor(self.labels.index(r["label"]))} for r in rows]
        return Toys(made, self)

    def answers(self, model, rows, *, batch_tokens=4096):
        for row in rows:
            logits = model(self.read(row)[None]).logits[0].float()
            yield {"label": self.labels[int(logits.argmax())]}

    def judge(self, rows, answers):
        right = np.array([[row["label"] == answer["label"], 1] for row, answer in zip(rows, answers, strict=True)])
        accuracy = interval(right, lambda sums: sums[..., 0] / sums[..., 1])
        return Judgement({"accuracy": accuracy, "error": accuracy}, "accuracy", len(rows))


class Toys(TaskExamples):
    def collate(self, examples):
        return pack(examples)

    def items(self, micro_batch):
        return {"sequences": len(micro_batch["labels"])}


def register() -> None:
    module = ModuleType("llmengine.tasks.toy")
    module.Toy = Toy  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    TASKS["toy"] = "Toy"


register()


def rows(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label, words = draw.choice([("good", GOOD), ("bad", BAD)])
        fill = draw.choices(["the", "day", "was", "a", "soup", "and", "film"], k=draw.randint(1, 6))
        made.append({"text": " ".join([*fill, draw.choice(words)]), "label": label})
    return made


def write(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def pretrained(directory: Path, preset: str = "bert-tiny", **fields) -> Path:
    """A model that knows nothing, with its tokenizer, as a directory."""
    tokenizer = Tokenizer.train([row["text"] for row in rows(80, 9)], "wordpiece", 100)
    tokens = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    fields = {"objectives": [], "family": "custom", **fields}
    torch.manual_seed(1)
    Transformer(TransformerConfig.preset(preset, **TINY, **tokens, **fields)).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def tiny(directory: Path, *overrides: str) -> FinetuneConfig:
    """Eight steps of sixteen sentences or so, evaluated every second; dropout is on."""
    if not (directory / "base").is_dir():
        pretrained(directory / "base")
        write(directory / "train.jsonl", rows(60))
    fields = {
        "task": "toy", "model": str(directory / "base"), "train": str(directory / "train.jsonl"), "steps": 8, "seed": 3,
        "validation": 0.2, "max_length": 16, "data": {"batch_tokens": 48, "accumulation": 2}, "optimizer": {"lr": 0.01},
        "every": {"evaluate": 2, "save": 3},
    }  # fmt: skip
    return FinetuneConfig.from_dict(fields, overrides)
