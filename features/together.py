"""Extraction of a view by several processes: each runs the backbone on its images, and all get the features."""

import socket
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import world
from features.file import Draft, mapped, say

CHUNK = 2**28  # bytes sent at once


def own_batches(batches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batches of a split that this process extracts: whole batches, so that features equal those of one process."""
    return batches[world().part(len(batches))]


def shared_file(draft: Draft | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The features of rank 0's draft as a mapped file that all processes write to; None if not all can.

    draft: that of rank 0, which discards it in that case.
    """
    if not world().several:
        return None if draft is None else draft.tensor
    here = None if draft is None else (socket.gethostname(), draft.temporary, draft.start)
    made = world().broadcast(here)
    found = None if draft is None else draft.tensor
    if made is not None and draft is None and made[0] == socket.gethostname():
        with suppress(OSError, RuntimeError):
            found = mapped(*made[1:], shape, dtype)
    if world().all(found is not None):
        return found
    if draft is not None:
        say(f"{draft.path} cannot be written by all processes: continuing without it")
        draft.discard()
    return None


def bring_together(features_NF: Tensor, batch_size: int) -> None:
    """Send the rows extracted by each process to all processes, in place."""
    total = len(features_NF)
    sizes = world().sizes(-(-total // batch_size))
    start = 0
    for rank, batches in enumerate(sizes):
        stop = min(total, start + batches * batch_size)
        for chunk in features_NF[start:stop].flatten().view(torch.uint8).split(CHUNK):
            dist.broadcast(chunk, src=rank)
        start = stop
