"""How several processes end together: if one fails, all end, and one line reports which one and why.

The processes communicate through a store of torch.distributed. A process may hang in a collective call for another
process that no longer exists, and then runs no Python code. Therefore a thread watches the others and ends it.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from common.errors import Interrupted, UserError, explained, say

LOOK = 0.5  # seconds between two checks of the others
FIRST = 2.0  # seconds in which rank 0 may report an error that all processes have
PATIENCE = 5.0  # seconds that a process waits for the reason why it lost another one
GRACE = 10.0  # seconds that a process has to end by itself after another one has failed
# What collective calls raise if another process no longer exists, with gloo and NCCL.
BROKEN = ("connection closed", "connection reset", "broken pipe", "timed out", "gloo", "nccl")


@contextmanager
def together(rank: int, size: int, store: Any) -> Iterator[None]:
    """Wrap a program that runs as several processes. store: shared by all, used only for this.

    An error ends this process at once, and the others soon after. The first process with an error reports it; if all
    have the same error, rank 0 does.
    """
    others = _Others(rank, size, store)
    stderr, debug = sys.stderr, "--debug" in sys.argv[1:]
    try:
        with _quiet(rank > 0):
            yield
    except BaseException as error:  # anything that ends one process ends the others
        with redirect_stderr(stderr):
            code = others.end(error)
            if debug and code > 0:
                traceback.print_exc()
        others.done()
        _exit(code)
    others.done()


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _exit(code: int) -> None:
    """End at once: threads and communicators that wait for ended processes would delay it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _Others:
    """The other processes: which of them are alive, and what has been reported."""

    def __init__(self, rank: int, size: int, store: Any):
        self.rank, self.size, self.store = rank, size, store
        self._lock = threading.Lock()  # a store serves one thread at a time
        self._host = socket.gethostname()
        self._stderr = sys.stderr
        self._set(f"process/{rank}", f"{self._host} {os.getpid()}")
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="others", daemon=True).start()

    def done(self) -> None:
        """This process is finished and may disappear."""
        self._set(f"done/{self.rank}", "yes")
        self._over.set()

    def end(self, error: BaseException) -> int:
        """Report what ended this process, unless another process has already done so; returns the exit code."""
        self._over.set()
        if isinstance(error, SystemExit):  # --help and the like, in all processes
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error, KeyboardInterrupt):
            code = getattr(error, "exit_code", 130)
            line = str(error) or "interrupted by SIGINT"
            if (lost := self._lost()) is not None:
                line, code = f"error: {death_of(lost)}", 1
            elif self.rank > 0:
                self._wait_for("told", FIRST)
            self._report(line)
            return code
        line, code = explained(error)
        if _is_of_others(error):
            self._end_without(line)
            return 1
        alike = isinstance(error, UserError) and not isinstance(error, Interrupted)
        if self.rank > 0 and alike:  # rank 0 reports what all have found
            self._wait_for("told", FIRST)
        name = f"rank {self.rank}: " if self.rank > 0 or not alike else ""
        self._report(f"error: {name}{line}")
        return code

    def _end_without(self, line: str) -> None:
        """A collective call failed: another process has disappeared, reported an error, or did not respond in time."""
        self._set(f"waited/{self.rank}", "yes")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._has("told"):
                return
            if (lost := self._lost()) is not None:
                return self._report(f"error: {death_of(lost)}")
            time.sleep(LOOK / 5)
        others = [rank for rank in range(self.size) if not self._has(f"waited/{rank}")]
        if others:
            self._report(
                f"error: rank {others[0]} did not respond in time, it hangs or is too slow: --resume continues from "
                "the last checkpoint, --parallel.timeout sets how long the others wait"
            )
        else:
            self._report(f"error: the processes lost their connection: {line}")

    def _watch(self) -> None:
        """End this process if another one has failed and this one hangs."""
        since = None
        while not self._over.wait(LOOK):
            lost = self._lost()
            if lost is None and not self._has("told"):
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > GRACE:
                sys.stderr = self._stderr
                if lost is not None:
                    self._report(f"error: {death_of(lost)}")
                _exit(1)

    def _lost(self) -> int | None:
        """A process of this machine that disappeared before it was finished."""
        for rank in range(self.size):
            if rank == self.rank or self._has(f"done/{rank}") or not self._has(f"process/{rank}"):
                continue
            host, pid = self._get(f"process/{rank}").split()
            if host != self._host or _lives(int(pid)):
                continue
            if not self._has(f"done/{rank}"):  # it may have finished since the first check
                return rank
        return None

    def _wait_for(self, key: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._has(key) and time.monotonic() < deadline:
            time.sleep(LOOK / 10)

    def _report(self, line: str) -> None:
        """Print a line, unless another process has printed one."""
        with self._lock, suppress(RuntimeError, ValueError):
            if self.store.compare_set("told", "", str(self.rank)).decode() != str(self.rank):
                return
        say(line)

    def _has(self, key: str) -> bool:
        with self._lock, suppress(RuntimeError, ValueError):  # the store ended with the process that hosted it
            return self.store.check([key])
        return False

    def _get(self, key: str) -> str:
        with self._lock:
            return self.store.get(key).decode()

    def _set(self, key: str, value: str) -> None:
        with self._lock, suppress(RuntimeError, ValueError):
            self.store.set(key, value)


def death_of(rank: int) -> str:
    """The error line for a process that disappeared."""
    return (
        f"rank {rank} has died: it was killed, perhaps because memory ran out; --resume continues from the last "
        "checkpoint"
    )


def _is_of_others(error: BaseException) -> bool:
    """Whether an error means that another process failed."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or any(words in text for words in BROKEN)


def _lives(pid: int) -> bool:
    """Whether a process of this machine is running; a zombie process is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    with suppress(OSError, IndexError):  # only if /proc exists
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    return True
