"""Several processes that run a function together, as torchrun would start them, on gloo."""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` processes of one group, forked from this one.

    Fails with the first traceback of any of them, and where they take longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(rank, count, Path(folder), function, arguments) for rank in range(count)]
        try:
            _wait(pids, time.monotonic() + seconds)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        failed = sorted(Path(folder).glob("*.error"))
        assert not failed, failed[0].read_text()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _wait(pids: list[int], until: float) -> None:
    """Until all have ended, though they stay to be waited for, or one has failed."""
    ended: dict[int, int] = {}
    while len(ended) < len(pids) and not any(ended.values()):
        assert time.monotonic() < until, "the processes wait for one another"
        for pid in pids:
            info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                ended[pid] = info.si_status
        time.sleep(0.01)


def _fork(rank: int, count: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
        torch.save(function(*arguments), folder / f"{rank}.pt")
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
