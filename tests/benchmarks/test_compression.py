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


def test_each_expert_has_its_error_under_each_calibration():
    """Expert 1 is removed, 2 becomes the second one; a shared expert and the linear head follow."""
    figures = {"load": 0.5, "done": ["int8"], "error": 0.01, "points_lost": 0.0}
    experts = [{"expert": str(number), "becomes": becomes} | figures for number, becomes in enumerate((0, None, 1))]
    experts[1] |= {"done": ["removed"], "error": None, "points_lost": None}
    experts += [{"expert": name, "becomes": None} | figures for name in ("shared 8", "linear head")]
    tried = {"equal": [0.01, 0.02, 0.03, 0.04], "none": [0.05, None, 0.07, 0.08]}
    found = {
        name: {"macro_f1_validation": 0.9, "fewest_rows": None, "errors": errors} for name, errors in tried.items()
    }
    row = {"experts": experts, "steps": [{"step": "prune"}, {"step": "quantise", "calibrations": found}]}
    assert [line[-2:] for line in compression.expert_lines(row)] == [
        ["1.000 %", "5.000 %"],
        ["–", "–"],
        ["2.000 %", "–"],
        ["3.000 %", "7.000 %"],
        ["4.000 %", "8.000 %"],
    ]
