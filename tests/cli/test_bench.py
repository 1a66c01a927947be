"""`llmengine bench`, on shapes so small that nothing is learnt of speed."""

from __future__ import annotations

import json

import torch

from tests.cli.conftest import call, succeed


def test_writes_rows_and_a_plot(tmp_path):
    said = succeed("bench", "ffn", "rms_norm", "--small", "--no-compile", "--device", "cpu", "--output", tmp_path)
    assert "limits measured here: copy" in said and "bench.json" in said
    result = json.loads((tmp_path / "bench.json").read_text())
    assert {row["operator"] for row in result["rows"]} == {"ffn", "rms_norm"}
    assert {row["dtype"] for row in result["rows"]} == {"fp32", "bf16"}
    assert {row["peer"] for row in result["rows"]} == {"llmengine", "torch"}
    assert not [row for row in result["rows"] if "error" in row]
    assert result["ceilings"]["gbytes_per_s"] > 0 and result["cut"] is None
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_threads_are_set_for_the_measurement_alone(tmp_path):
    before = torch.get_num_threads()
    succeed("bench", "softmax", "--small", "--no-compile", "--device", "cpu", "--threads", 1, "--output", tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_stops_in_time_and_says_before_what(tmp_path):
    said = succeed("bench", "--small", "--no-compile", "--device", "cpu", "--seconds", 0, "--output", tmp_path)
    assert "stopped: 0 s are over before attention" in said
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == []


def test_what_is_unknown_is_named(tmp_path):
    for given, said in [
        (["convolution"], "'convolution' is unknown; allowed are attention, ffn, linear, linear_cross_entropy"),
        (["ffn", "--dtype", "int4"], "'int4' is unknown; allowed are fp32, bf16"),
        (["ffn", "--device", "tpu"], "--device tpu: allowed are auto, cpu, cuda"),
        (["ffn", "--threads", "0"], "--threads 0: must be at least 1"),
    ]:
        result = call("bench", *given, "--small", "--output", tmp_path)
        assert result.exit_code == 2 and said in result.output, result.output
    assert not list(tmp_path.iterdir())
