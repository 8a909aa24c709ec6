"""A batch that several processes hold together: sums, rows and random numbers of the whole of it.

    with sharing(Share(rank, sizes)):      # of a training step: what is asked inside is of the whole batch
        logits, routings = model(...)

Outside such a block, which is in one process and in evaluation, the functions here return their argument.

Each process computes a loss of which the sum over all processes is the loss of the batch, and gradients are summed.
What all processes compute alike of the whole batch, such as a balance loss, is differentiated with respect to a
process's own rows there; the sum of these gradients is that of the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The rows of a batch that a process has: those of rank 0 come first.

    sizes: samples of each rank; of one entry where each process has the whole batch. generator: the source of the
    random numbers that are drawn for the whole batch, in the same state in all processes (None: each draws its own).
    group: the processes (None: all).
    """

    rank: int
    sizes: tuple[int, ...]
    generator: torch.Generator | None = field(default=None, compare=False)
    group: Any = field(default=None, compare=False)

    @property
    def total(self) -> int:
        """Samples of the whole batch."""
        return sum(self.sizes)

    @property
    def split(self) -> bool:
        """Whether each process has a part only."""
        return len(self.sizes) > 1

    @property
    def part(self) -> float:
        """The samples here as a share of the whole batch."""
        return self.sizes[self.rank] / self.total if self.split else 1.0

    def gather(self, x: Tensor) -> Tensor:
        """(R, ...) -> the rows of all processes, (R', ...): own rows are differentiable, the others constants.

        R: a multiple of the samples here, the same in each process.
        """
        if not self.split:
            return x
        each = len(x) // self.sizes[self.rank]
        most = each * max(self.sizes)
        sent = x.detach().contiguous()
        sent = sent.to(torch.uint8) if x.dtype == torch.bool else sent
        if len(sent) < most:
            sent = torch.cat([sent, sent.new_zeros(most - len(sent), *sent.shape[1:])])
        got = sent.new_empty(len(self.sizes) * most, *sent.shape[1:])
        _all_gather(got, sent, group=self.group)
        rows = [part[: each * size] for part, size in zip(got.split(most), self.sizes, strict=True)]
        rows = [part.to(x.dtype) for part in rows] if x.dtype == torch.bool else rows
        rows[self.rank] = x
        return torch.cat(rows)

    @property
    def start(self) -> int:
        """Samples of the whole batch that come before those of this process."""
        return sum(self.sizes[: self.rank]) if self.split else 0

    def own(self, whole: Tensor) -> Tensor:
        """The rows of this process among those of all, (R', ...) -> (R, ...)."""
        if not self.split:
            return whole
        each = len(whole) // self.total
        return whole[each * self.start : each * (self.start + self.sizes[self.rank])]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes; differentiable with respect to every process's part."""
        return _Sum.apply(x, self.group) if self.split else x


_current: Share | None = None


def current_share() -> Share | None:
    """The share of the batch that this process has (None: all of it)."""
    return _current


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Inside, this process has a share of the batch (None: all of it)."""
    global _current  # noqa: PLW0603, as autograd's modes are of the process
    before, _current = _current, share
    try:
        yield
    finally:
        _current = before


def is_split() -> bool:
    """Whether this process has a part of the batch only."""
    return _current is not None and _current.split


def gathered(x: Tensor) -> Tensor:
    """`Share.gather` of the current batch."""
    return x if _current is None else _current.gather(x)


def own_rows(whole: Tensor) -> Tensor:
    """`Share.own` of the current batch."""
    return whole if _current is None else _current.own(whole)


def summed(x: Tensor) -> Tensor:
    """`Share.sum` of the current batch."""
    return x if _current is None else _current.sum(x)


def whole_size(rows: int) -> int:
    """How many rows the whole batch has, where this process has so many."""
    return rows // _current.sizes[_current.rank] * _current.total if _current is not None and _current.split else rows


def rows_before(rows: int) -> int:
    """How many rows of the whole batch come before those of this process, of which there are so many."""
    return rows // _current.sizes[_current.rank] * _current.start if _current is not None and _current.split else 0


def rand_like(x: Tensor) -> Tensor:
    """Numbers drawn evenly from 0 to 1, in the shape and format of x (R, ...), without a gradient.

    Of a batch that several processes hold, the numbers that one process with all of it would have drawn.
    """
    return _drawn(torch.rand, torch.rand_like, x)


def randn_like(x: Tensor) -> Tensor:
    """Numbers drawn from the standard normal distribution; else as `rand_like`."""
    return _drawn(torch.randn, torch.randn_like, x)


def _drawn(draw: Callable[..., Tensor], alone: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # What is compiled knows no generator: there each process draws its own numbers.
    if _current is None or _current.generator is None or torch.compiler.is_compiling():
        return alone(x)
    shape = (whole_size(len(x)), *x.shape[1:])
    return own_rows(draw(shape, generator=_current.generator, dtype=x.dtype, device=x.device))


# Its name since torch 2.14, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
