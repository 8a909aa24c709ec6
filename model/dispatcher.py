"""Dispatchers: send samples to their experts and return the outputs, in one process or between several.

As in torchtitan's token dispatchers, one interface covers both cases: `dispatch` sends rows to the experts of this
process, and `combine` returns their outputs to the assignments. The code between the two, and the code that uses the
outputs, does not depend on the dispatcher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from .routing import Assignments
from .rows import gather, inverse, pick


@dataclass(frozen=True)
class Received:
    """The work for the experts of this process: rows (R, D), and the assignments of rows to its experts.

    way_back: data for `combine` of the same dispatcher.
    """

    x_RD: Tensor
    assignments: Assignments
    way_back: Any = None


class Dispatcher(Protocol):
    """Sends samples to experts and returns the outputs."""

    local: bool
    """Whether all experts are in this process, so that nothing waits for other processes."""

    def dispatch(self, x_BD: Tensor, assignments: Assignments) -> Received:
        """Samples (B, D) of this process -> rows for its experts."""
        ...

    def combine(self, received: Received, outputs_RC: Tensor, order_R: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, row i for the received assignment order_R[i] -> (outputs (A, C), order_A) of those dispatched."""
        ...


class LocalDispatcher:
    """All experts are in this process."""

    local = True

    def dispatch(self, x_BD: Tensor, assignments: Assignments) -> Received:
        return Received(x_BD, assignments)

    def combine(self, received: Received, outputs_RC: Tensor, order_R: Tensor) -> tuple[Tensor, Tensor]:
        return outputs_RC, order_R


class AllToAllDispatcher:
    """Experts are distributed over the M processes of a group; all-to-all exchanges send rows there and back.

    Expert parallelism as in GShard (Lepikhin 2020) and Switch Transformers, without padding: the numbers of rows are
    exchanged first, which is the only time that a dispatch waits for the device. Gradients travel back the same way, so
    an expert's gradient is that of all samples of the group.

    share_EM: the share of each expert's assignments that each process computes; rows sum to 1. An expert with several
    shares has a copy on each of these processes: the caller must keep the copies equal.
    """

    local = False

    def __init__(self, group: dist.ProcessGroup, share_EM: Sequence[Sequence[float]], device: torch.device):
        import_module(".uncompiled", __package__)  # not in a compiled block, which imports from it
        self.group, self.members, self.rank = group, group.size(), group.rank()
        shares_EM = torch.tensor(share_EM, dtype=torch.float64)
        if shares_EM.shape[1] != self.members or not torch.allclose(shares_EM.sum(1), torch.ones(()).double()):
            raise ValueError(f"shares of shape {tuple(shares_EM.shape)} do not sum to 1 over {self.members} processes")
        self.mine = [e for e, share_M in enumerate(share_EM) if share_M[self.rank] > 0]
        self.mine_L = torch.tensor(self.mine, dtype=torch.int64, device=device)
        self.whole = bool(((shares_EM == 0) | (shares_EM == 1)).all())
        ends_EM = shares_EM.cumsum(1)
        ends_EM[ends_EM > 1 - 1e-9] = 1.0
        self.ends_EM, self.owner_E = ends_EM.to(device), shares_EM.argmax(1).to(device)

    def __deepcopy__(self, memo: dict) -> "AllToAllDispatcher":
        return self  # a moving average has the same placement as the model

    def dispatch(self, x_BD: Tensor, assignments: Assignments) -> Received:
        order_A, counts_ME = self._plan(assignments)
        counts_SE = torch.empty_like(counts_ME)  # number of rows from each process for each expert
        dist.all_to_all_single(counts_SE, counts_ME, group=self.group)
        counts_SL = counts_SE.index_select(1, self.mine_L)
        told = _on_its_way(torch.cat([counts_ME.sum(1), counts_SL.sum(1), counts_SL.sum(0)]))
        rows_AD = gather(x_BD, assignments.sample_A.index_select(0, order_A), inverse(order_A), assignments)
        numbers, members = told(), self.members
        sent, came, sizes = numbers[:members], numbers[members : 2 * members], numbers[2 * members :]
        rows_RD = _all_to_all(rows_AD, came, sent, self.group)
        # Rows are ordered by process, and by expert within each process.
        local_X = torch.arange(len(self.mine), device=x_BD.device).repeat(self.members)
        expert_R = local_X.repeat_interleave(counts_SL.flatten(), output_size=sum(came))
        here = Assignments(
            torch.arange(sum(came), device=x_BD.device),
            expert_R,
            assignments.weight_A.new_ones(sum(came)),
            sum(came),
            counts_SL.sum(0),
            top_k=1,
            sizes=sizes,
        )
        return Received(rows_RD, here, (order_A, sent, came))

    def combine(self, received: Received, outputs_RC: Tensor, order_R: Tensor) -> tuple[Tensor, Tensor]:
        order_A, sent, came = received.way_back
        outputs_RC = pick(outputs_RC, inverse(order_R))
        return _all_to_all(outputs_RC, sent, came, self.group), order_A

    def _plan(self, assignments: Assignments) -> tuple[Tensor, Tensor]:
        """The assignments sorted by process and expert, (A,), and the number for each process and expert, (M, E)."""
        expert_A, counts_E = assignments.expert_A, assignments.counts_E
        experts = len(counts_E)
        ends_EM = (
            (self.ends_EM * counts_E[:, None]).round().long()
        )  # end of each process's rows among those of an expert
        counts_ME = ends_EM.diff(dim=1, prepend=torch.zeros_like(ends_EM[:, :1])).T.contiguous()
        if self.whole:
            process_A = self.owner_E.index_select(0, expert_A)
        else:  # the first rows of an expert go to the first process that has it, and so on
            by_expert_A = expert_A.argsort(stable=True)
            start_A = (counts_E.cumsum(0) - counts_E).index_select(0, expert_A)
            position_A = inverse(by_expert_A) - start_A
            process_A = (position_A[:, None] >= ends_EM.index_select(0, expert_A)).sum(1)
        return (process_A * experts + expert_A).argsort(stable=True), counts_ME


def _on_its_way(values: Tensor) -> Callable[[], list[int]]:
    """A function that waits for the values and returns them; meanwhile a GPU computes the operations after them."""
    if not values.is_cuda:
        return values.tolist
    host, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def arrived() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return arrived


def _all_to_all(rows: Tensor, come: list[int], go: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to each process of a group in splits of `go`, from each in splits of `come`; differentiable."""
    return functional.all_to_all_single_autograd(rows, come, go, group)
