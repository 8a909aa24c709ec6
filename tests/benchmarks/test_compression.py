"""The benchmark of compression: each method has a line, and failures have a reason."""

import json

import pytest

from benchmarks import compression


@pytest.mark.slow
def test_every_method_has_a_line(tiny_run, tmp_path, capsys, without_figures):
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--runs", str(tiny_run)]
    compression.main([*words, "--methods", "int8", "dense student"])
    rows = json.loads((tmp_path / "compression_tiny.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["int8", "dense student"]
    assert all(row["after"]["macro_f1_test"] is not None for row in rows)
    assert rows[0]["after"]["expert_bytes"] < rows[0]["before"]["expert_bytes"]
    shown = capsys.readouterr().out
    assert "as trained" in shown and "int8: equal" in shown and "| 3 · 128" in shown


@pytest.mark.slow
def test_a_failure_has_a_reason(tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--methods", "prune"]
    compression.main([*words, "--runs", str(tmp_path / "none")])
    assert "is not a folder" in capsys.readouterr().out


def test_a_method_without_enough_time_is_not_started(tiny_run, tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--methods", "prune", "--seconds", "0"]
    compression.main([*words, "--runs", str(tiny_run)])
    shown, said = capsys.readouterr()
    assert "no time left" in shown and "prune: no time left" in said
