"""A narrow domain: scores by hand, and the program."""

import json

import pytest
import torch

from benchmarks import narrow


def test_macro_f1_covers_the_requested_classes():
    true, answer = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 5, 1, 1])
    assert narrow.macro_f1(true, answer, [0, 1]) == pytest.approx((2 / 3 + 1) / 2)


def test_unused_experts_are_counted():
    row = {"macro_f1": 0.5, "alone": 0.75, "load": [0.6, 0.395, 0.005], "entropy": 0.7, "worth": [0.1, 0.0, -0.02]}
    rows = [
        {
            "norm": "batch",
            "replay": 20,
            "way": way,
            "seed": seed,
            "before": {"narrow": row, "others": row},
            "after": {"narrow": row, "others": row},
        }
        for way in ("free", "frozen")
        for seed in (0, 1)
    ]
    columns, cells = narrow.summary(rows)
    assert [line[1:3] for line in cells] == [["", "before"], ["20", "free"], ["20", "frozen"]]
    assert all(len(line) == len(columns) for line in cells)
    assert cells[1][columns.index("unused")] == "1.00 ± 0.00"
    assert cells[1][columns.index("smallest load")] == "0.50 ± 0.00"


@pytest.mark.slow
def test_each_way_runs_once_and_a_frozen_gate_routes_as_before(tmp_path):
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--seeds", "0", "--replay", "2", "--ways"]
    narrow.main([*words, "frozen"])
    narrow.main([*words, "frozen", "distance"])
    rows = [json.loads(line) for line in (tmp_path / "narrow_tiny.jsonl").read_text().splitlines()]
    assert [row["way"] for row in rows] == ["frozen", "distance"]
    assert rows[0]["after"]["others"]["load"] == rows[0]["before"]["others"]["load"]
