"""The combined routing of a batch shared by several processes, for balance losses and counters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import Share
from .routing import Assignments, Drops, Gate, Routing


def whole_batch(routings: Sequence[Routing], share: Share) -> tuple[Routing, ...]:
    """The routing of the whole batch at each place, the same in all processes, with two exchanges in total.

    Gates contain the rows of all processes; only own rows are differentiable. Assignments are summed: there is one per
    expert, with the total number and weight, so counts, demand, drops and importance are those of the batch, but
    single samples cannot be distinguished.
    """
    if not share.split:
        return tuple(routings)
    gates = _gathered([_columns(routing) for routing in routings], share)
    sums = _summed([_sums(routing) for routing in routings], share)
    return tuple(_whole(*parts) for parts in zip(routings, gates, sums, strict=True))


def _columns(routing: Routing) -> list[Tensor]:
    """The tensors of a gate that have one row per sample, without duplicates."""
    gate = routing.gate
    tempered = [] if gate.tempered_BE is gate.logits_BE else [gate.tempered_BE]
    others = (gate.load_BE, gate.importance_BE, gate.old_BE)
    return [gate.logits_BE, *tempered, *(rows for rows in others if rows is not None)]


def _gathered(columns: list[list[Tensor]], share: Share) -> list[list[Tensor]]:
    """The tensors of all processes. A sample may have several rows (tokens) at one place and one row at another."""
    count = share.sizes[share.rank]
    flat = [tensor.float().reshape(count, -1) for tensors in columns for tensor in tensors]
    parts = iter(share.gather(torch.cat(flat, dim=1)).split([part.shape[1] for part in flat], dim=1))
    return [[next(parts).reshape(-1, tensor.shape[1]) for tensor in tensors] for tensors in columns]


def _sums(routing: Routing) -> list[Tensor]:
    """The tensors to sum over the processes: counts and demand (E,), drops (1,), importance (E,)."""
    drops = routing.counts_E.new_zeros(()) if routing.drops is None else routing.drops.count
    return [routing.counts_E, routing.demand_E, drops[None], routing.importance_E]


def _summed(sums: list[list[Tensor]], share: Share) -> list[list[Tensor]]:
    """Sums over the processes, in float64, which represents counts exactly; own parts stay differentiable."""
    flat = [tensor for tensors in sums for tensor in tensors]
    with torch.no_grad():
        total = share.sum(torch.cat([tensor.double() for tensor in flat]))
    parts = iter(total.split([len(tensor) for tensor in flat]))
    return [[_with_gradient(next(parts), tensor) for tensor in tensors] for tensors in sums]


def _with_gradient(total: Tensor, own: Tensor) -> Tensor:
    """The total in the number format of `own`, and with its gradient."""
    total = total.to(own.dtype)
    return total + (own - own.detach()) if own.requires_grad else total


def _whole(routing: Routing, gate: list[Tensor], sums: list[Tensor]) -> Routing:
    of_gate, (counts_E, demand_E, dropped_1, importance_E) = iter(gate), sums
    own = routing.gate
    logits_BE = next(of_gate)
    tempered_BE = logits_BE if own.tempered_BE is own.logits_BE else next(of_gate)
    load_BE = None if own.load_BE is None else next(of_gate)
    importance_BE = None if own.importance_BE is None else next(of_gate)
    old_BE = None if own.old_BE is None else next(of_gate)
    expert_E = torch.arange(len(counts_E), device=counts_E.device)
    return Routing(
        Assignments(torch.zeros_like(expert_E), expert_E, importance_E, len(logits_BE), counts_E),
        Gate(logits_BE, tempered_BE, load_BE, importance_BE, own.target_E, own.work_E, old_BE),
        None if routing.drops is None else Drops(dropped_1[0], demand_E),
        routing.learned,
    )
