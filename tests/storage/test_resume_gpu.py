"""Exact resume on a GPU, where it needs deterministic algorithms."""

import json
import signal
import subprocess

import pytest
import torch
from conftest import TINY, run_program, running_program

from storage.checkpoint import load_checkpoint
from storage.folder import RunFolder

OPTIONS = [*TINY.split(), "--train.epochs", "60", "--train.deterministic", "true", "--device", "cuda"]
OPTIONS += ["--train.save_every", "3", "--experts.dropout", "0.2", "--tracking", "none"]


def interrupt(number: int, epoch: int, *arguments: str) -> int:
    """Run train.py and send it a signal when it has finished `epoch`. Returns the exit code."""
    with running_program("train.py", *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for line in process.stdout:
            if line.startswith(f"epoch {epoch:3}/"):
                process.send_signal(number)
        return process.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its deterministic algorithms cannot be tried")
def test_killed_and_resumed_on_a_gpu_equals_uninterrupted(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_program("train.py", *OPTIONS, "--run_dir", whole).returncode == 0
    assert interrupt(signal.SIGTERM, 10, *OPTIONS, "--run_dir", str(part)) == 143
    assert interrupt(signal.SIGKILL, 31, "--resume", str(part)) == -signal.SIGKILL
    done = run_program("train.py", "--resume", part)
    assert done.returncode == 0, done.stderr
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    kept, expected = (load_checkpoint(RunFolder(run).last) for run in (part, whole))
    for name in ("model", "ema"):
        assert all(torch.equal(value, expected[name][key]) for key, value in kept[name].items())
    lines, undisturbed = (
        [{k: v for k, v in line.items() if not k.startswith("speed")} for line in RunFolder(run).history()]
        for run in (part, whole)
    )
    assert lines == undisturbed and len(lines) == 60
    scores = [json.loads((run / "evaluation" / "metrics.json").read_text()) for run in (part, whole)]
    assert scores[0]["macro_f1"] == scores[1]["macro_f1"]
