"""The progress line, on a terminal and in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmengine.training import ProgressLine, train
from llmengine.training.progress import duration, with_prefix
from tests.training.runs import At, interrupt, tiny


def watched(tmp_path, *observers, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140 if terminal else 60)
    train(tiny(tmp_path, "bert"), tmp_path / "run", observers=[ProgressLine(console), *observers])
    return console.file.getvalue()


def test_plain_lines(tmp_path):
    text = watched(tmp_path, terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("bert: ") and "parameters on cpu, fp32, steps 1 to 8" in lines[0]
    assert lines[1].startswith("step 1/8  loss ") and "tokens/s" in lines[1] and "FLOP/s" in lines[1]
    assert lines[0].endswith("steps an epoch"), "whole, however narrow the place is"
    assert any(line.startswith("step 8/8  loss ") and line.endswith("0:00 left") for line in lines)
    held_out = [line for line in lines if "held out" in line]
    assert len(held_out) == 2 and all("perplexity" in line and "accuracy mlm" in line for line in held_out)


def test_a_live_line(tmp_path):
    text = watched(tmp_path, terminal=True)
    assert "step 8/8" in text and "held out" in text
    assert "\x1b[?25l" in text and text.rstrip("\r\n").count("\x1b[?25h") == 1, "the cursor is back"


def test_notices_come_through(tmp_path):
    assert "SIGINT after step 2" in watched(tmp_path, At(2, interrupt), terminal=False)


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (86400, "24:00:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("value, text", [(0.0, "0 "), (999.0, "999 "), (1.23e12, "1.23 T"), (5e15, "5 P")])
def test_with_prefix(value, text):
    assert with_prefix(value) == text
