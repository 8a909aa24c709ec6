"""Several processes that form one run, started by torchrun: their ranks, shared values and common end.

with started():                     # around a program, before anything that can fail
    with joined(device, timeout):   # inside, the processes can exchange tensors
        ...

A process that was started alone is a world of size one, in which all of this does nothing. Of several processes only
rank 0 prints; an error in one of them ends all, with one line.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common import ending
from common.errors import EnvironmentFault, UserError

T = TypeVar("T")
OLDEST = (2, 8)  # PyTorch; 2.6 may wait until the time limit when a process leaves a group
MEETING_SECONDS = 120.0  # how long processes wait for the last one to start


@dataclass(frozen=True)
class World:
    """The processes of a run: the rank of this process, their number, and the rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def gather(self, value: T) -> list[T]:
        """The values of all processes, ordered by rank, in every process. The values must be picklable."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """The value of rank 0, in every process."""
        if not self.several:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def all(self, true: bool) -> bool:
        """Whether the value is true in all processes."""
        return all(self.gather(true))

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        self.gather(None)

    def sizes(self, total: int) -> tuple[int, ...]:
        """The number of items of each rank, as even as possible, larger numbers first."""
        least, more = divmod(total, self.size)
        return tuple(least + (rank < more) for rank in range(self.size))

    def part(self, total: int) -> slice:
        """The range of items that belong to this process."""
        sizes = self.sizes(total)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


ALONE = World()
_world = ALONE
_meeting: Path | None = None


def world() -> World:
    """The processes of this run, after they have `joined`; before, a world of size one."""
    return _world


def expected_world() -> World:
    """The processes that were started together, from the environment. Raises UserError for invalid values."""
    try:
        return World(*(int(os.environ.get(name) or default) for name, default in _VARIABLES))
    except ValueError as error:
        raise UserError(
            "RANK, WORLD_SIZE and LOCAL_RANK are set, but not to numbers: start several processes with torchrun, or "
            "unset them"
        ) from error


_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


@contextmanager
def meeting_at(path: Path) -> Iterator[None]:
    """Inside, processes find each other through this file instead of torchrun's variables."""
    global _meeting  # noqa: PLW0603, as the process group of PyTorch is one of the process
    _meeting = path
    try:
        yield
    finally:
        _meeting = None


@contextmanager
def started() -> Iterator[World]:
    """Wrap a program: an error in one of its processes ends all of them, and one process reports it in one line.

    Output of ranks other than 0 is hidden. Raises UserError if the variables of torchrun are wrong.
    """
    found = expected_world()
    if not found.several:
        yield ALONE
        return
    with ending.together(found.rank, found.size, _meet(found, "ending")):
        yield found


def require_alone(program: str) -> None:
    """Raise UserError if several processes were started for a program that runs as one; only one of them reports it."""
    if expected_world().several:
        with started():
            raise UserError(
                f"{program} runs as one process: start it with python {program}; torchrun is only for train.py"
            )


@contextmanager
def joined(device: torch.device, timeout: float = 600.0) -> Iterator[World]:
    """The world of the processes that were started together, inside the block; of size one for a single process.

    device: the device of this process; NCCL transfers tensors of GPUs, gloo those of the CPU. timeout: seconds after
    which waiting for the others is an error. Raises UserError if two processes share a GPU.
    """
    global _world  # noqa: PLW0603, as above
    found = expected_world()
    if not found.several:
        yield ALONE
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        raise UserError(
            f"several processes need PyTorch {'.'.join(map(str, OLDEST))} or newer, and this is {torch.__version__}: "
            "update it, or start one process"
        )
    # At the time limit NCCL must cancel its calls, not abort the process, which still has to report the error.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    numbers = {"rank": found.rank, "world_size": found.size}
    dist.init_process_group(backend, store=_meet(found, "group"), timeout=timedelta(seconds=timeout), **numbers)
    _world = found
    try:
        _require_separate_gpus(found, device)
        yield found
    except BaseException:
        if device.type == "cpu":
            dist.destroy_process_group()
        # NCCL would wait for CUDA graphs that the error still holds; who has `started` ends the process at once.
        raise
    else:
        dist.destroy_process_group()
    finally:
        _world = ALONE


def _meet(found: World, purpose: str) -> dist.Store:
    """A connection to the store of all processes. Raises UserError; EnvironmentFault if the others do not connect."""
    if _meeting is not None:
        return dist.FileStore(f"{_meeting}-{purpose}", found.size)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS))))
        return dist.PrefixStore(purpose, store)
    except (ValueError, RuntimeError) as error:  # what PyTorch raises without MASTER_ADDR, and without an answer
        if "MASTER_ADDR" not in os.environ:
            raise UserError("WORLD_SIZE is set, but not MASTER_ADDR: start several processes with torchrun") from error
        raise EnvironmentFault(
            f"the {found.size} processes did not connect to {os.environ['MASTER_ADDR']} within {MEETING_SECONDS:.0f} s"
            ": start all of them, with an address that each can reach"
        ) from error


def _require_separate_gpus(found: World, device: torch.device) -> None:
    used = ("",) if device.type != "cuda" else (socket.gethostname(), _name_of(device))
    first: dict[tuple[str, ...], int] = {}
    for rank, gpu in enumerate(found.gather(used)):
        other = first.setdefault(gpu, rank)
        if other != rank and device.type == "cuda":
            raise UserError(
                f"ranks {other} and {rank} share a GPU of {gpu[0]}, and each needs its own: start at most "
                f"{torch.cuda.device_count()} processes there, leave --device at auto, or choose --device cpu"
            )


def _name_of(device: torch.device) -> str:
    """A GPU's identity, which does not depend on the GPUs that a process can see."""
    found = torch.cuda.get_device_properties(device)
    return str(getattr(found, "uuid", device))
