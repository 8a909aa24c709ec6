"""The benchmarks of trained models run."""

import json

import pytest

from benchmarks import cost, offload

TINY = ["--tiny", "--device", "cpu", "--seconds", "0.05", "--out"]


def test_experts_in_host_memory_are_copied_unless_they_are_kept(tmp_path, capsys):
    offload.main([*TINY, str(tmp_path)])
    rows = json.loads((tmp_path / "offload_tiny.json").read_text())["rows"]
    assert [row["share"] for row in rows] == list(offload.SHARES) and [row["kept"] for row in rows] == [4, 4, 2, 1, 0]
    one = rows[0]["bytes"] / offload.TINY["experts"]
    for row in rows:
        copied = row["batches"]["8"]["copied"]
        assert (copied == 0) == (row["kept"] == 4) and copied <= one * (4 - row["kept"])
    assert rows[-1]["batches"]["1"]["copied"] == 2 * one  # top-2 of one sample
    assert capsys.readouterr().out.count("\n| ") == 6


@pytest.mark.slow
def test_a_mixture_and_its_dense_twin_are_shown_side_by_side(tmp_path, capsys):
    words = [*TINY, str(tmp_path), "--data.max_per_class", "13"]
    cost.main([*words, "--train.epochs", "1"])
    mixture, dense = json.loads((tmp_path / "cost_tiny.json").read_text())["figures"].values()
    assert dense["active_parameters"] == dense["trained_parameters"]
    assert mixture["active_parameters"] < mixture["trained_parameters"]
    assert mixture["memory_bytes"] - dense["memory_bytes"] > 4 * 0.9 * (
        mixture["trained_parameters"] - dense["trained_parameters"]
    )
    assert all(found["latency_cpu_1"] > 0 < found["latency_cpu_256"] for found in (mixture, dense))
    assert "| latency of 256 images, CPU |" in capsys.readouterr().out
    cost.main([*words, "--untrained"])
    untrained = json.loads((tmp_path / "cost_tiny.json").read_text())["figures"].values()
    for trained, new in zip((mixture, dense), untrained, strict=True):
        sizes = ("total_parameters", "trained_parameters", "memory_bytes")
        assert [new[name] for name in sizes] == [trained[name] for name in sizes] and new["latency_cpu_1"] > 0
