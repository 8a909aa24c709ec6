"""configs/sweep.sh: six valid runs that differ in the stated options, without duplicates."""

import shutil
import subprocess

from conftest import ROOT

from config.command_line import parse_command_line


def test_a_sweep_is_six_runs_and_skips_finished_ones(tmp_path):
    (tmp_path / "configs").mkdir()
    for name in ("sweep.sh", "digits.yaml"):
        shutil.copy(ROOT / "configs" / name, tmp_path / "configs")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s|" "$word"; done; echo\n')
    program.chmod(0o755)

    def sweep(*options):
        command = ["sh", tmp_path / "configs" / "sweep.sh", *options]
        done = subprocess.run(command, env={"PYTHON": str(program)}, capture_output=True, text=True, check=True)
        return [line.rstrip("|").split("|") for line in done.stdout.splitlines()]

    calls = sweep("--config", str(ROOT / "configs" / "digits.yaml"), "--train.epochs", "3")
    configs = [parse_command_line(words[1:]).config for words in calls]
    assert all(words[0] == "train.py" for words in calls)
    assert {(config.router.top_k, config.balance.switch) for config in configs} == {
        (top_k, balance) for top_k in (1, 2) for balance in (0.0, 0.01, 0.1)
    }
    for config in configs:
        assert config.run_dir.name == f"sweep-k{config.router.top_k}-balance{config.balance.switch}"
        assert (config.data.name, config.train.epochs) == ("digits", 3)
    done = tmp_path / "runs" / configs[0].run_dir.name / "evaluation"
    done.mkdir(parents=True)
    (done / "metrics.json").touch()
    again = sweep()
    assert len(again) == 5 and all("configs/digits.yaml" in words for words in again)
