"""Dispatch and combine: run the experts on their samples in one of three modes with equal results, mix the outputs.

| sorted | samples sorted by expert, one expert after the other | waits for the device once per step |
| grouped | samples sorted by expert, experts of one shape in one grouped product | static shapes, never waits |
| dense | every expert on every sample, first layers in one product | static shapes, never waits |

Modes that never wait can be captured in a CUDA graph. A sample goes to an expert at most once.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatcher import Received
from .experts import Experts, ExpertSet
from .grouped import fits, has_kernel, run_on_all, run_on_own
from .routing import Assignments
from .rows import gather, inverse, pick

# Measured by benchmarks/dispatch.py on an H200; near these numbers the modes are equally fast within noise. The first
# numbers are products of samples and parameters: below them dense takes no longer than the launches of any other mode
# or, in a CUDA graph, than their kernels, for experts of one shape and of several. The last numbers are samples per
# expert above which sorted is faster than grouped, again for one shape and for several.
DENSE_WORK, DENSE_WORK_IN_A_GRAPH = 500_000_000_000, (20_000_000_000, 100_000_000_000)
SORTED_FROM = 16_384, 4096

NO_WEIGHT = -1e3  # replaces log 0: below all logarithms of probabilities, but not far, for precision


def dispatch(
    x_BD: Tensor, assignments: Assignments, experts: Experts, dispatch_mode: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the experts on the samples assigned to them, in autocast's dtype if it is on.

    dispatch_mode: sorted, grouped, dense, auto, static (a mode that suits a CUDA graph), or plain (dense, for an
    export). Returns (outputs (A, C), order_A): row i of the outputs belongs to assignment order_A[i]. An expert without
    samples gets a gradient of zero in every mode, because modes that never wait cannot know that it has none: the
    optimizer applies weight decay to it, and its moments decay.
    """
    received = send(x_BD, assignments, experts)
    return run_experts(received, experts, dispatch_mode)


def send(x_BD: Tensor, assignments: Assignments, experts: ExpertSet) -> Received:
    """The first half of `dispatch`: send the rows, in autocast's number format if it is on."""
    device = x_BD.device.type
    if torch.is_autocast_enabled(device):
        x_BD = x_BD.to(torch.get_autocast_dtype(device))
    return experts.dispatcher.dispatch(x_BD, assignments)


def run_experts(received: Received, experts: Experts, dispatch_mode: str = "auto") -> tuple[Tensor, Tensor]:
    """The second half of `dispatch`: run the experts of this process on the received rows, and return the outputs."""
    x_RD, assignments = received.x_RD, received.assignments
    if dispatch_mode in ("auto", "static"):
        static = dispatch_mode == "static" and experts.dispatcher.local
        dispatch_mode = choose(len(assignments.sample_A), experts, x_RD, static)
    with torch.autocast(x_RD.device.type, enabled=False):
        outputs_RC, order_R = DISPATCHERS[dispatch_mode](x_RD, assignments, experts)
    return experts.dispatcher.combine(received, outputs_RC, order_R)


def choose(number: int, experts: Experts, x_BD: Tensor, static: bool = False) -> str:
    """The best mode for a number of assignments on this device. static: one that never waits, for a CUDA graph."""
    samples, several = x_BD.shape[0], len(experts.groups) > 1
    members: Any = experts
    if number == samples * len(experts):  # also if both are 0
        return "dense"
    if not x_BD.is_cuda:
        return "dense" if static else "sorted"
    if samples * experts.num_parameters <= (DENSE_WORK_IN_A_GRAPH[several] if static else DENSE_WORK):
        return "dense"
    # Each shape gets its largest possible number of rows: that pays off with two or more experts per shape, on average,
    # if a sample goes to less than half of all experts.
    pays = not several or (2 * len(experts.groups) <= len(experts) and 2 * number < samples * len(experts))
    few = number < SORTED_FROM[several] * len(experts)
    if pays and (static or few) and has_kernel(x_BD) and fits(members) and experts.go_together(x_BD.shape[1]):
        return "grouped"
    return "dense" if static else "sorted"


def run_sorted(x_BD: Tensor, assignments: Assignments, experts: Experts) -> tuple[Tensor, Tensor]:
    """Run one expert after the other on its own samples, even if it has none."""
    order_A = torch.argsort(assignments.expert_A, stable=True)
    sorted_AD = gather(x_BD, assignments.sample_A.index_select(0, order_A), inverse(order_A), assignments)
    # The host must know the sizes of the slices: the only place where a step waits for the device.
    sizes = assignments.counts_E.tolist() if assignments.sizes is None else assignments.sizes
    slices = sorted_AD.split(sizes)
    return torch.cat([expert(part) for expert, part in zip(experts, slices, strict=True)]), order_A


def run_dense(x_BD: Tensor, assignments: Assignments, experts: Experts) -> tuple[Tensor, Tensor]:
    """Run every expert on every sample: more FLOPs, in fewer and larger products."""
    row_A = experts.rank_E.index_select(0, assignments.expert_A) * len(x_BD) + assignments.sample_A
    order_A = torch.arange(len(row_A), device=row_A.device)
    together, outputs = experts.go_together(x_BD.shape[1]), []
    for groups in experts.generations:
        shapes: list[list[Any]] = [[experts[e] for e in group] for group in groups]
        if together:
            outputs.append(run_on_all(shapes, x_BD))
        else:
            outputs.append(torch.stack([expert(x_BD) for members in shapes for expert in members]))
    outputs_EBC = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return pick(outputs_EBC.flatten(0, 1), row_A), order_A


def run_grouped(x_BD: Tensor, assignments: Assignments, experts: Experts) -> tuple[Tensor, Tensor]:
    """Run experts of one shape together: a grouped product finds each expert's rows by offsets on the device.

    Experts that read different features run dense, because they share no rows.
    """
    if not experts.go_together(x_BD.shape[1]):
        return run_dense(x_BD, assignments, experts)
    groups = experts.groups
    members: list[Any] = list(experts)
    key_A = experts.rank_E.index_select(0, assignments.expert_A)
    order_A = torch.argsort(key_A, stable=True)
    sorted_key_A, sample_A = key_A.index_select(0, order_A), assignments.sample_A.index_select(0, order_A)
    ends_E = assignments.counts_E.index_select(0, experts.expert_E).cumsum(0)
    if len(groups) == 1:
        rows_AD = gather(x_BD, sample_A, inverse(order_A), assignments)
        return run_on_own(members, rows_AD, ends_E, sorted_key_A), order_A
    position_A = torch.arange(len(order_A), device=x_BD.device)
    place_A = torch.zeros_like(position_A)  # row of each assignment, in sorted order
    windows, first, before = [], 0, 0
    for group in groups:
        last = first + len(group)
        start = ends_E[first - 1] if first else ends_E.new_zeros(())
        # The largest number of rows that the group can have; outputs of unused rows are not read.
        most = min(len(order_A), len(x_BD) * len(group))
        taken_R = (position_A[:most] + start).clamp_max(len(order_A) - 1)
        key_R = (sorted_key_A.index_select(0, taken_R) - first).clamp(0, len(group) - 1)
        windows.append((taken_R, ends_E[first:last] - start, key_R))
        mine_A = (sorted_key_A >= first) & (sorted_key_A < last)
        place_A = torch.where(mine_A, position_A - start + before, place_A)
        first, before = last, before + most
    taken, ends, keys = zip(*windows, strict=True)
    row_A = torch.empty_like(place_A).scatter_(0, order_A, place_A)
    rows = gather(x_BD, sample_A.index_select(0, torch.cat(taken)), row_A, assignments).split([len(t) for t in taken])
    outputs = [
        run_on_own([members[e] for e in group], rows_RD, ends_G, key_R)
        for group, rows_RD, ends_G, key_R in zip(groups, rows, ends, keys, strict=True)
    ]
    return pick(torch.cat(outputs), row_A), position_A


def run_plain(x_BD: Tensor, assignments: Assignments, experts: Experts) -> tuple[Tensor, Tensor]:
    """Every expert on every sample, one after another, in operations that every export format supports."""
    outputs_EBC = torch.stack([expert(x_BD) for expert in experts])
    row_A = assignments.expert_A * x_BD.shape[0] + assignments.sample_A
    return outputs_EBC.flatten(0, 1).index_select(0, row_A), torch.arange(row_A.shape[0], device=row_A.device)


DISPATCHERS = {"sorted": run_sorted, "grouped": run_grouped, "dense": run_dense, "plain": run_plain}


def combine_logits(outputs_AC: Tensor, order_A: Tensor, assignments: Assignments) -> Tensor:
    """Weighted sum of the experts' logits, float32 (B, C); zeros for a sample without experts."""
    weighted_AC = outputs_AC.float() * assignments.weight_A.index_select(0, order_A)[:, None]
    zeros_BC = weighted_AC.new_zeros(assignments.num_samples, outputs_AC.shape[1])
    return zeros_BC.index_add(0, assignments.sample_A.index_select(0, order_A), weighted_AC)


def combine_probabilities(outputs_AC: Tensor, order_A: Tensor, assignments: Assignments) -> Tensor:
    """Log of the weighted sum of the experts' class probabilities, float32 (B, C), up to a constant per sample.

    A mixture distribution (Jacobs 1991), whose cross-entropy is the mixture's negative log-likelihood if the weights of
    a sample sum to 1. Computed as a log-sum-exp over each sample's experts; zeros for a sample without experts.
    """
    sample_A = assignments.sample_A.index_select(0, order_A)
    weight_A1 = assignments.weight_A.index_select(0, order_A)[:, None]
    # A softmax weight may underflow, and log 0 has no finite gradient. An expert with weight 0 counts less than any
    # other expert, and only matters if a sample has no other.
    log_A1 = weight_A1.clamp_min(torch.finfo(torch.float32).tiny).log().masked_fill(weight_A1 == 0, NO_WEIGHT)
    log_AC = outputs_AC.float().log_softmax(dim=-1) + log_A1
    index_AC = sample_A[:, None].expand_as(log_AC)
    zeros_BC = log_AC.new_zeros(assignments.num_samples, log_AC.shape[1])
    peak_BC = zeros_BC.scatter_reduce(0, index_AC, log_AC.detach(), "amax", include_self=False)
    sum_BC = zeros_BC.index_add(0, sample_A, (log_AC - peak_BC.index_select(0, sample_A)).exp())
    unseen_B1 = torch.ones_like(zeros_BC[:, :1]).index_fill(0, sample_A, 0.0)
    return (sum_BC + unseen_B1).log() + peak_BC


COMBINE = {"logits": combine_logits, "probabilities": combine_probabilities}
