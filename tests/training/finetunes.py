"""Tiny fine-tuning runs for tests: sentences of two classes, and a small model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from llmengine import Transformer, TransformerConfig
from llmengine.data.tokenizer import Tokenizer
from llmengine.training import FinetuneConfig
from llmengine.training.finetuning import Finetuning

TINY = {"n_layers": 2, "d_model": 16, "d_ff": 32, "n_heads": 2, "max_positions": 32}
GOOD, BAD = ("fine", "lovely", "warm"), ("dull", "awful", "cold")


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


def pairs(count: int, seed: int = 0) -> list[dict]:
    """Of two answers the friendly one is better."""
    draw = random.Random(seed)
    asked = (draw.choices(["day", "soup", "film", "was", "the"], k=draw.randint(1, 4)) for _ in range(count))
    return [{"prompt": " ".join(a), "chosen": draw.choice(GOOD), "rejected": draw.choice(BAD)} for a in asked]


def preferring(directory: Path, *overrides: str) -> FinetuneConfig:
    """`tiny` of preferences, with rows to test with."""
    if not (directory / "gpt").is_dir():
        pretrained(directory / "gpt", "gpt-tiny", objectives=["clm"])
        write(directory / "pairs.jsonl", pairs(40))
        write(directory / "test.jsonl", pairs(12, 1))
    given = ("task=preference", f"model={directory}/gpt", f"train={directory}/pairs.jsonl", "max_length=24",
             f"test={directory}/test.jsonl")  # fmt: skip
    return tiny(directory, *given, *overrides)


def pretrained(directory: Path, preset: str = "bert-tiny", seed: int = 1, **fields) -> Path:
    """A model that knows nothing, with its tokenizer, as a directory."""
    tokenizer = Tokenizer.train([row["text"] for row in rows(80, 9)], "wordpiece", 100)
    tokens = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    fields = {"objectives": ["mlm"], "pooler": "none", **fields}
    torch.manual_seed(seed)
    Transformer(TransformerConfig.preset(preset, **TINY, **tokens, **fields)).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def held_out_losses(monkeypatch, *losses: float) -> None:
    """What a run's evaluations find, one after another."""
    found = iter(losses)

    def evaluate(run: Finetuning) -> dict:
        loss = next(found)
        return {
            "loss": loss,
            "losses": {"classification": loss},
            "scores": {},
            "select": "loss",
            "lower_is_better": True,
        }

    monkeypatch.setattr(Finetuning, "evaluate", evaluate)


def tiny(directory: Path, *overrides: str) -> FinetuneConfig:
    """Eight steps of sixteen sentences or so, evaluated every second; dropout is on."""
    if not (directory / "base").is_dir():
        pretrained(directory / "base")
    if not (directory / "train.jsonl").is_file():
        write(directory / "train.jsonl", rows(60))
    fields = {
        "task": "classification", "model": str(directory / "base"), "train": str(directory / "train.jsonl"), "steps": 8,
        "seed": 3, "validation": 0.2, "max_length": 16, "data": {"batch_tokens": 48, "accumulation": 2},
        "optimizer": {"lr": 0.01},
        "every": {"evaluate": 2, "save": 3},
    }  # fmt: skip
    return FinetuneConfig.from_dict(fields, overrides)
