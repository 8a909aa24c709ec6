"""A failure of one process ends all of them, with one line, and leaves a checkpoint for --resume."""

import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, running_program
from distributed_helpers import Program, skip_old_torch

from assembly import ready
from common import ending
from storage.checkpoint import load_checkpoint
from training.trainer import Trainer

WORDS = [
    "--config",
    "configs/digits.yaml",
    "--data.max_per_class",
    "20",
    "--neck.kind",
    "pooled",
    "--backbone.features",
    "[cls:1,mean:1]",
    "--router.warmup_steps",
    "3",
    "--train.batch_size",
    "36",
    "--train.epochs",
    "3",
    "--train.save_every",
    "1",
    "--tracking",
    "none",
]
STEP = 6  # of the second epoch, of four steps each
LIMIT = 30  # seconds in which all must have ended


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def at_step(rank: int, action) -> None:
    """Make this process do something within a step, before its gradients are summed with the others."""
    train_batch = Trainer._train_batch

    def then(self, batch, *arguments):
        if self.step == STEP:
            batch = batch._replace(features=action(rank, batch.features))
        train_batch(self, batch, *arguments)

    Trainer._train_batch = then


def fail(folder, action, *words: object, size: int = 2) -> Program:
    program = Program(folder, size, *WORDS, "--run_dir", folder / "run", *words, before=lambda r: at_step(r, action))
    program.started = time.monotonic()
    return program


def killed(rank: int, features: torch.Tensor) -> torch.Tensor:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return features


def out_of_memory(rank: int, features: torch.Tensor) -> torch.Tensor:
    if rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return features


def overflowing(rank: int, features: torch.Tensor) -> torch.Tensor:
    return features * float("inf") if rank == 1 else features


def hanging(rank: int, features: torch.Tensor) -> torch.Tensor:
    if rank == 1:
        ending.GRACE = 1.0
        time.sleep(3600)
    return features


def signalled(rank: int, features: torch.Tensor) -> torch.Tensor:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return features


FAILURES = {
    "killed": (killed, [1, -signal.SIGKILL], "error: rank 1 has died"),
    "out of memory": (out_of_memory, [1, 1], "error: rank 1: out of memory (CUDA out of memory."),
    "not finite": (overflowing, [2, 2], "error: the output of the backbone is not finite on rank 1 at step 7"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_one_line_names_the_process_and_resume_continues(name, tmp_path):
    action, codes, line = FAILURES[name]
    program = fail(tmp_path, action)
    assert program.codes() == codes, program.said()
    assert time.monotonic() - program.started < 10 * LIMIT  # on a busy machine
    (said,) = program.errors()
    assert said.startswith(line)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert checkpoint["step"] == 4 and not list((tmp_path / "run").rglob("*.partial"))
    resumed = Program(tmp_path, 2, "--resume", tmp_path / "run")
    assert resumed.codes() == [0, 0] and not resumed.errors(), resumed.said()
    assert "resuming" in resumed.said() and resumed.said().count("run folder") == 2


@pytest.mark.slow
def test_a_hanging_process_is_found_by_the_time_limit(tmp_path):
    program = fail(tmp_path, hanging, "--parallel.timeout", 3)
    assert os.waitstatus_to_exitcode(os.waitpid(program.pids[0], 0)[1]) == 1
    assert program.errors()[0].startswith("error: rank 1 did not respond in time")
    os.waitpid(program.pids[1], 0)  # its own watch ends it


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_with_a_checkpoint(tmp_path):
    program = fail(tmp_path, signalled, "--train.epochs", 50, size=3)
    assert program.codes() == [143] * 3, program.said()
    assert not program.errors() and program.said().count("interrupted by SIGTERM") == 1
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert 7 <= checkpoint["step"] < 200


def interrupted_twice(rank: int, features: torch.Tensor) -> torch.Tensor:
    """Like Ctrl-C under torchrun, which forwards the signal that the terminal has sent to all."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    return features


@pytest.mark.slow
def test_ctrl_c_stops_all_with_a_checkpoint(tmp_path):
    program = fail(tmp_path, interrupted_twice, "--train.epochs", 50)
    assert program.codes() == [128 + signal.SIGINT] * 2, program.said()
    assert not program.errors() and program.said().count("interrupted by SIGINT") == 1
    assert STEP < load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] < 200


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_all_with_a_checkpoint(tmp_path):
    skip_old_torch()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *WORDS]
    more = ["--train.epochs", 100_000, "--train.save_every", 100_000, "--run_dir", tmp_path / "run"]
    output = tmp_path / "said.txt"
    with output.open("w") as file, running_program(*words, *more, stdout=file, stderr=file) as process:
        while not last.exists():
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        began = time.monotonic()
        process.terminate()
        process.wait()
    assert time.monotonic() - began < 10 * LIMIT  # on a busy machine
    # The rest is from torchrun, which ends after its processes.
    assert output.read_text().count("interrupted by SIGTERM") == 1
    assert not any(ending._lives(int(pid)) for pid in children.stdout.split())
    assert not list((tmp_path / "run").rglob("*.partial")) and load_checkpoint(last)["step"] > 4


def another_rate(rank: int) -> None:
    import sys

    if rank == 1:
        sys.argv += ["--optim.lr", "0.5"]


def another_torch(rank: int) -> None:
    if rank == 1:
        torch.__version__ = "99.0.0"


def other_data(rank: int) -> None:
    import sys

    if rank == 1:
        sys.argv += ["--data.max_per_class", "21"]


def other_images(rank: int) -> None:
    """The same options, but one different pixel."""
    load_images = ready.load_images

    def changed(config):
        splits = load_images(config)
        splits.train.images_NCHW[0, 0, 0, 0] ^= rank
        return splits

    ready.load_images = changed


BAD = {
    "more processes than experts": (
        "--parallel.experts 3 --experts.sizes [[4],[8]]",
        None,
        "parallel.experts 3 is more than the 2 experts: set it to at most 2",
    ),
    "other images": ("", other_images, "the processes differ: the train images is "),
    "a batch smaller than the processes": ("--train.batch_size 2", None, "train.batch_size 2 cannot be shared by 3"),
    "another option": ("", another_rate, "the processes differ: option optim.lr is 0.001 on rank 0, 0.5 on rank 1"),
    "another version": ("", another_torch, "the processes differ: PyTorch is '"),
    "other data": ("", other_data, "the processes differ: option data.max_per_class is 20 on rank 0, 21 on rank 1"),
    "a wrong option in all": ("--router.kind topk", None, "--router.kind is 'topk'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_of_rank_0_and_leaves_no_process_behind(name, tmp_path):
    words, before, line = BAD[name]
    program = Program(tmp_path, 3, *WORDS, "--run_dir", tmp_path / "run", *words.split(), before=before)
    assert program.codes() == [2, 2, 2], program.said()
    (said,) = program.errors()
    assert said.startswith(f"error: {line}") and said in program.output(0).read_text()
    assert not (tmp_path / "run").exists()
