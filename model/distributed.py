"""A batch that is split over several processes: sums, rows and random numbers of the whole batch.

with sharing(Share(rank, sizes)):      # in a training step: functions inside refer to the whole batch
    logits, routings = model(...)

Outside such a block, that is, in a single process or in evaluation, the functions here return their argument.

The sum of the losses of all processes is the loss of the batch, and gradients are summed. A quantity that all
processes compute for the whole batch, such as a balance loss, is differentiated in each process with respect to its own
rows; the sum of these gradients is the gradient for the whole batch.
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
    """The rows of a batch that belong to a process; those of rank 0 come first.

    sizes: number of samples of each rank; a single entry if each process has the whole batch. generator: source of the
    random numbers for the whole batch, in the same state in all processes (None: each process draws its own). group:
    the processes (None: all).
    """

    rank: int
    sizes: tuple[int, ...]
    generator: torch.Generator | None = field(default=None, compare=False)
    group: Any = field(default=None, compare=False)

    @property
    def total(self) -> int:
        """Number of samples in the whole batch."""
        return sum(self.sizes)

    @property
    def split(self) -> bool:
        """Whether each process has only a part."""
        return len(self.sizes) > 1

    @property
    def part(self) -> float:
        """The samples of this process as a fraction of the whole batch."""
        return self.sizes[self.rank] / self.total if self.split else 1.0

    def gather(self, x: Tensor) -> Tensor:
        """(R, ...) -> the rows of all processes, (R', ...): own rows are differentiable, the others are constants.

        R: a multiple of the number of samples, with the same factor in each process.
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
        """Number of samples of the whole batch before those of this process."""
        return sum(self.sizes[: self.rank]) if self.split else 0

    def own(self, whole: Tensor) -> Tensor:
        """The rows of this process among those of all processes, (R', ...) -> (R, ...)."""
        if not self.split:
            return whole
        each = len(whole) // self.total
        return whole[each * self.start : each * (self.start + self.sizes[self.rank])]

    def stack(self, x: Tensor) -> Tensor:
        """The tensors of all P processes, of one shape (...), in the order of their ranks: (P, ...), no gradients."""
        got = x.new_empty(len(self.sizes), *x.shape)
        _all_gather(got, x[None].contiguous(), group=self.group)
        return got

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes; differentiable with respect to every process's part."""
        return _Sum.apply(x, self.group) if self.split else x


_current: Share | None = None


def current_share() -> Share | None:
    """The share of the batch on this process (None: all of it)."""
    return _current


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Inside the block, this process has a share of the batch (None: all of it)."""
    global _current  # noqa: PLW0603, as autograd's modes are of the process
    before, _current = _current, share
    try:
        yield
    finally:
        _current = before


def is_split() -> bool:
    """Whether this process has only a part of the batch."""
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
    """The number of rows of the whole batch, given the number of this process."""
    return rows // _current.sizes[_current.rank] * _current.total if _current is not None and _current.split else rows


def rows_before(rows: int) -> int:
    """The number of rows of the whole batch before those of this process, given the number of this process."""
    return rows // _current.sizes[_current.rank] * _current.start if _current is not None and _current.split else 0


def rand_like(x: Tensor) -> Tensor:
    """Uniform random numbers from 0 to 1, in the shape and format of x (R, ...), without a gradient.

    If several processes share a batch, these are the numbers that a single process would have drawn.
    """
    return _drawn(torch.rand, torch.rand_like, x)


def randn_like(x: Tensor) -> Tensor:
    """Standard normal random numbers; otherwise as `rand_like`."""
    return _drawn(torch.randn, torch.randn_like, x)


def _drawn(draw: Callable[..., Tensor], alone: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # Compiled code does not support generators: there each process draws its own numbers.
    if _current is None or _current.generator is None or torch.compiler.is_compiling():
        return alone(x)
    shape = (whole_size(len(x)), *x.shape[1:])
    return own_rows(draw(shape, generator=_current.generator, dtype=x.dtype, device=x.device))


# The name since torch 2.14, and the older name.
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
