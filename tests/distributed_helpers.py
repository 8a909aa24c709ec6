"""Run a function in several processes that form one world, on a CPU."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import import_lazy_modules
from torch import multiprocessing

from common.distributed import OLDEST, joined, meeting_at
from common.errors import exit_code_of

SECONDS = 120.0  # limit for a process to wait for the others


def skip_old_torch() -> None:
    """Skip the test if PyTorch is too old for several processes."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        pytest.skip(f"several processes need PyTorch {'.'.join(map(str, OLDEST))}, and this is {torch.__version__}")


def in_processes(size: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu") -> list[Any]:
    """The result of `function(world, *arguments)` in each of several processes; it must be accepted by torch.save.

    function: of a module, not of a test. device: cpu, or cuda, a GPU each. Fails with the traceback of the first
    process that does.
    """
    skip_old_torch()
    with tempfile.TemporaryDirectory() as folder:
        # A new interpreter needs seconds for imports, but code that uses a GPU cannot be forked.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() or device == "cuda" else "fork")
        started = [
            context.Process(target=_work, args=(rank, size, folder, device, function, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        failed = sorted(Path(folder).glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
        assert not failed, failed[0].read_text()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


class Program:
    """`train.py WORDS` in several processes, forked from this one, because importing everything again takes seconds.

    before: called in each process with its rank, to change its behaviour. evaluates: whether it ends with an
    evaluation, without drawing figures.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *words: object,
        before: Callable[[int], None] | None = None,
        evaluates: bool = False,
    ):
        skip_old_torch()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.evaluates = folder, evaluates
        self.meeting = folder / f"store-{time.monotonic_ns()}"
        self.pids = [self._fork(rank, size, [str(word) for word in words], before) for rank in range(size)]

    def _fork(self, rank: int, size: int, words: list[str], before: Callable[[int], None] | None) -> int:
        import_lazy_modules()
        import train
        from evaluation import figures

        output = self.output(rank)
        output.unlink(missing_ok=True)
        if pid := os.fork():
            return pid
        code = 99
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.argv = ["train.py", *words]
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            figures.draw = lambda *arguments: []  # slow, and tested elsewhere
            if not self.evaluates:
                train.evaluate, train.expert_table = (lambda *arguments, **options: {}), (lambda results: "")
            if before is not None:
                before(rank)
            with meeting_at(self.meeting):
                code = exit_code_of(train.main)
        finally:
            os._exit(code)

    def output(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def said(self) -> str:
        """The output of the processes, concatenated."""
        return "".join(self.output(rank).read_text() for rank in range(len(self.pids)))

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith(("error", "Traceback"))]

    def codes(self) -> list[int]:
        """Wait for all; the exit codes in the order of the ranks, negative for a signal."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


def _work(rank: int, size: int, folder: str, device: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    here = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(here)
    try:
        with meeting_at(Path(folder) / "store"), joined(here, SECONDS) as world:
            torch.save(function(world, *arguments), Path(folder) / f"{rank}.pt")
    except BaseException:  # also SystemExit: the parent shows it
        (Path(folder) / f"{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)
