"""Benchmarks that train: time to accuracy, methods to adapt a ViT, and contributions of experts."""

import json

import pytest
from benchmark_helpers import TINY, read

from benchmarks import (
    adaptation,
    time_to_accuracy,
    worth,
)
from config.command_line import parse_command_line


@pytest.mark.slow
def test_time_to_accuracy_runs(tmp_path, capsys):
    time_to_accuracy.main([*TINY, str(tmp_path), "--repeats", "1", "--live-epochs", "0"])
    assert "goal: ours" in capsys.readouterr().out
    runs = read(tmp_path, "time_to_accuracy")["runs"]
    assert runs["ours"][0]["seconds"] > 0 and len(runs["ours"][0]["epoch_seconds"]) == 3
    assert 0 < runs["article as written"][0]["curve"][0]["epoch"] < 1  # stopped by --seconds


@pytest.mark.slow
def test_finished_results_are_kept_after_an_interruption(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(time_to_accuracy, "as_written", interrupt)
    with pytest.raises(KeyboardInterrupt):
        time_to_accuracy.main([*TINY, str(tmp_path), "--repeats", "1", "--live-epochs", "0"])
    assert list(read(tmp_path, "time_to_accuracy")["runs"]) == ["ours"]


def test_the_goal_uses_the_slower_middle_run_and_no_live_run():
    run = {"macro_f1": 0.8, "seconds": 2.0}
    article = {"macro_f1": 0.7, "seconds": 100.0}
    runs = {
        "ours": [run, {**run, "seconds": 4.0}],
        "ours, live backbone, 2 epochs": [run],
        time_to_accuracy.ARTICLE: [article],
    }
    (line,) = time_to_accuracy.goal(runs, ["ours"])
    assert "80.00 % in 4.0 s" in line and "25.0 times" in line
    assert time_to_accuracy.goal({"ours": [run]}, ["ours"]) == ["goal: not measured"]


def test_a_live_run_of_fewer_epochs_has_proportional_warm_ups():
    config = parse_command_line(["--train.epochs", "10", "--router.warmup_steps", "50", "--optim.warmup_steps", "20"])
    live = time_to_accuracy.short(config.config, 2)
    assert (live.train.epochs, live.router.warmup_steps, live.optim.warmup_steps) == (2, 10, 4)
    assert live.features.mode == "live"


@pytest.mark.slow
def test_adaptation_methods_share_a_file_of_runs(tmp_path, capsys):
    options = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--pick_epochs", "1"]
    options += ["--data.max_per_class", "13", "--methods"]
    adaptation.main([*options, "experts", "full"])
    lines = adaptation.read(tmp_path / "adaptation_tiny.jsonl")
    assert [(line["method"], line["pick"]) for line in lines] == [
        ("experts", False),
        *[("full", True)] * 3,
        ("full", False),
    ]
    assert lines[4]["lr"] == max(lines[1:4], key=lambda line: line["macro_f1"])["lr"]
    assert lines[4]["trained"] > lines[0]["trained"]
    capsys.readouterr()
    adaptation.main([*options, "full"])
    assert adaptation.read(tmp_path / "adaptation_tiny.jsonl") == lines
    shown = capsys.readouterr().out
    assert f"{100 * (lines[4]['macro_f1'] - lines[0]['macro_f1']):+.2f}" in shown


def test_only_runs_with_the_chosen_rate_are_in_the_table():
    picks = [{"method": "full", "pick": True, "seed": 0, "lr": lr, "macro_f1": f1} for lr, f1 in ((1, 0.1), (2, 0.2))]
    runs = [{"method": "full", "pick": False, "seed": seed, "lr": lr} for seed, lr in ((0, 1), (0, 2), (1, 1))]
    for index, run in enumerate(runs):
        run |= {"macro_f1": 0.5 + index / 10, "trained": 1e6, "seconds": 3.0}
    _, rows = adaptation.report([*picks, *runs])
    assert [row[:4] for row in rows] == [["full", "2", 1, "60.00"]]


def test_the_dense_adapter_is_as_wide_as_the_active_experts_under_an_even_load():
    base = parse_command_line(["--config", "configs/cifar100.yaml"]).config
    dense = adaptation.of_method("dense", base, [], None)
    assert dense.experts.sizes == [[120]] and dense.router.top_k == 1 and base.router.top_k == 2


@pytest.mark.slow
def test_contributions_of_experts_are_stored_for_each_recipe(tmp_path, capsys):
    worth.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--name", "four"])
    (line,) = [json.loads(text) for text in (tmp_path / "worth_tiny.jsonl").read_text().splitlines()]
    assert len(line["worth"]) == len(line["load"]) == 4 and sum(line["load"]) == pytest.approx(1)
    assert all(value <= line["macro_f1"] for value in line["worth"])  # the score without an expert is at least 0
    assert "| four   | 0" in capsys.readouterr().out
