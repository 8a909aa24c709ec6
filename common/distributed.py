"""Several processes that are one run, as torchrun starts them: who is who, and what they agree on.

A process that was started alone is a world of one, in which everything here does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's number, how many there are, and its number on this machine."""

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
        """The values of all processes, in the order of their ranks, in every one; what pickle takes."""
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
        """Whether it is true in all processes."""
        return all(self.gather(true))

    def wait(self) -> None:
        """Until all processes have come here."""
        self.gather(None)

    def sizes(self, total: int) -> tuple[int, ...]:
        """So many things dealt out as evenly as possible: how many each rank gets, larger numbers first."""
        least, more = divmod(total, self.size)
        return tuple(least + (rank < more) for rank in range(self.size))

    def part(self, total: int) -> slice:
        """Which of so many things in a row are this process's."""
        sizes = self.sizes(total)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


ALONE = World()
_world = ALONE


def world() -> World:
    """The processes of this run; a world of one until `joined`."""
    return _world


def expected_world() -> World:
    """What the environment says of the processes that were started together. Raises UserError where it is no number."""
    try:
        numbers = [int(os.environ.get(name, default)) for name, default in _VARIABLES]
    except ValueError as error:
        raise UserError(
            "RANK, WORLD_SIZE and LOCAL_RANK are set, but not to numbers: start several processes with torchrun, or "
            "unset them"
        ) from error
    return World(*numbers)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@contextmanager
def joined(device: torch.device, timeout: float = 600.0, meeting: Path | None = None) -> Iterator[World]:
    """The world of the processes that torchrun has started, inside the block; alone this is a world of one.

    device: of this process: NCCL carries tensors of GPUs, gloo those of the CPU. timeout: seconds after which waiting
    for the others is an error. meeting: a file by which they find each other (None: as torchrun's variables say).
    """
    global _world  # noqa: PLW0603, as the process group of PyTorch is one of the process
    found = expected_world()
    if not found.several:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = None if meeting is None else dist.FileStore(str(meeting), found.size)
    numbers = {} if store is None else {"rank": found.rank, "world_size": found.size}
    dist.init_process_group(backend, store=store, timeout=timedelta(seconds=timeout), **numbers)
    _world = found
    try:
        yield found
    finally:
        _world = ALONE
        dist.destroy_process_group()
