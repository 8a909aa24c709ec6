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
    """The rows of all processes. A sample may have several rows (its tokens) at one place and a single row at another.

    Tensors of equal shape, such as those of all blocks of a ViT, share one exchange and a few kernels.
    """
    flat = [tensor.float() for tensors in columns for tensor in tensors]
    alike: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(flat):
        alike.setdefault(tensor.shape, []).append(index)
    for members in alike.values():
        rows_RLE = torch.stack([flat[index] for index in members], dim=1)
        whole_LRE = share.gather(rows_RLE).transpose(0, 1).contiguous()
        for index, whole_RE in zip(members, whole_LRE.unbind(), strict=True):
            flat[index] = whole_RE
    parts = iter(flat)
    return [[next(parts) for _ in tensors] for tensors in columns]


def _sums(routing: Routing) -> list[Tensor]:
    """The tensors to sum over the processes: counts and demand (E,), drops (1,), importance (E,)."""
    drops = routing.counts_E.new_zeros(()) if routing.drops is None else routing.drops.count
    return [routing.counts_E, routing.demand_E, drops[None], routing.importance_E]


def _summed(sums: list[list[Tensor]], share: Share) -> list[list[Tensor]]:
    """Sums over the processes, in float64, which holds counts exactly; own parts stay differentiable."""
    flat = [tensor for tensors in sums for tensor in tensors]
    # All together, because each operation costs a kernel launch, even on so few numbers.
    counts, weights = (torch.cat([t for t in flat if t.is_floating_point() == real]) for real in (False, True))
    with torch.no_grad():
        total = share.sum(torch.cat([counts.double(), weights.double()]))
    total_counts, total_weights = total.split([len(counts), len(weights)])
    total_weights = total_weights.to(weights.dtype)
    if weights.requires_grad:
        total_weights = total_weights + (weights - weights.detach())
    parts = {}
    for real, values in ((False, total_counts.to(counts.dtype)), (True, total_weights)):
        parts[real] = iter(values.split([len(t) for t in flat if t.is_floating_point() == real]))
    return [[next(parts[tensor.is_floating_point()]) for tensor in tensors] for tensors in sums]


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
