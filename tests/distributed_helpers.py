"""Run a function in several processes that are one world, on a CPU."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from common.distributed import joined, meeting_at

SECONDS = 120.0  # that a process waits for the others


def in_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns in each of so many gloo processes; what torch.save takes.

    function: of a module, not of a test. Fails with the traceback of the first process that does.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A new interpreter imports for seconds; but what uses a GPU cannot be forked.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
        started = [
            context.Process(target=_work, args=(rank, size, folder, function, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        failed = sorted(Path(folder).glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
        assert not failed, failed[0].read_text()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    try:
        with meeting_at(Path(folder) / "store"), joined(torch.device("cpu"), SECONDS) as world:
            torch.save(function(world, *arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)
