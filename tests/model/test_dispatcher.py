"""Experts on several processes: values and gradients of a single process for any distribution."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import mostly_slow
from distributed_helpers import in_processes

from model.dispatch import COMBINE, dispatch
from model.dispatcher import AllToAllDispatcher
from model.experts import ExpertsConfig, build_experts
from model.routing import Assignments

UNEQUAL = [[8], [16, 8], [24], [8, 8, 16]]
BATCH, FEATURES, CLASSES = 11, 6, 5


def choices(top_k: int, barred: int | None = None, kept: float = 1.0) -> Assignments:
    """Random choices of all samples; barred: an expert that none chooses. kept: share of the choices with a slot."""
    generator = torch.Generator().manual_seed(0)
    scores_BE = torch.randn(BATCH, len(UNEQUAL), generator=generator)
    if barred is not None:
        scores_BE[:, barred] = -10
    weight_BK, expert_BK = scores_BE.softmax(1).topk(top_k)
    found = Assignments.of_each(expert_BK, weight_BK, len(UNEQUAL))
    if kept < 1:
        found = found.kept(torch.rand(len(found.sample_A), generator=generator) < kept)
    return found


def part_of(whole: Assignments, first: int, last: int) -> Assignments:
    """The assignments of the samples from `first` to before `last`."""
    mine_A = (whole.sample_A >= first) & (whole.sample_A < last)
    sample_A = whole.sample_A[mine_A] - first
    shape = (last - first, whole.num_experts)
    return Assignments.listed(sample_A, whole.expert_A[mine_A], whole.weight_A[mine_A], shape, whole.top_k)


def outcome(experts, x_BD, assignments, target_BC, mode, combine):
    """Outputs, and gradients of inputs, weights and parameters by name."""
    x_BD = x_BD.clone().requires_grad_()
    assignments = replace(assignments, weight_A=assignments.weight_A.clone().requires_grad_())
    out_BC = COMBINE[combine](*dispatch(x_BD, assignments, experts, mode), assignments)
    (out_BC * target_BC).sum().backward()
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return out_BC.detach(), x_BD.grad, assignments.weight_A.grad, gradients


def build():
    torch.manual_seed(0)
    experts = build_experts(ExpertsConfig(sizes=UNEQUAL, dropout=0.0), FEATURES, CLASSES)[0]
    return experts, torch.randn(BATCH, FEATURES), torch.randn(BATCH, CLASSES)


def sharded(world, ends: list[int], share_EM, whole: Assignments, mode: str, combine: str):
    """In one of the processes: the results for its samples, ends[rank] to ends[rank + 1] - 1."""
    experts, x_BD, target_BC = build()
    dispatcher = AllToAllDispatcher(dist.group.WORLD, share_EM, torch.device("cpu"))
    experts.keep(dispatcher.mine)
    experts.dispatcher = dispatcher
    first, last = ends[world.rank], ends[world.rank + 1]
    part = part_of(whole, first, last)
    return outcome(experts, x_BD[first:last], part, target_BC[first:last], mode, combine)


CASES = {
    "even": ([0, 6, 11], [[1, 0], [1, 0], [0, 1], [0, 1]], choices(2), "sorted", "logits"),
    "not in order": ([0, 6, 11], [[0, 1], [1, 0], [0, 1], [0, 1]], choices(2), "dense", "probabilities"),
    "every expert": ([0, 1, 11], [[1, 0], [0, 1], [1, 0], [1, 0]], choices(4), "grouped", "logits"),
    "an empty expert and an empty process": (
        [0, 6, 11],
        [[0, 1], [1, 0], [0, 1], [0, 1]],
        choices(1, 1),
        "auto",
        "logits",
    ),
    "no samples on a process": ([0, 0, 11], [[1, 0], [0, 1], [1, 0], [0, 1]], choices(3), "sorted", "logits"),
    "drops": ([0, 6, 11], [[1, 0], [0, 1], [1, 0], [0, 1]], choices(3, kept=0.5), "sorted", "probabilities"),
    "copies": ([0, 6, 11], [[0.3, 0.7], [1, 0], [0, 1], [0.5, 0.5]], choices(2), "sorted", "logits"),
    "three": ([0, 4, 8, 11], [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0.2, 0, 0.8]], choices(2), "sorted", "logits"),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, ["three", "drops", "copies"]))
def test_values_and_gradients_are_those_of_one_process(case):
    ends, share_EM, whole, mode, combine = CASES[case]
    experts, x_BD, target_BC = build()
    out_BC, grad_BD, grad_A, gradients = outcome(experts, x_BD, whole, target_BC, "sorted", combine)
    found = in_processes(len(ends) - 1, sharded, ends, share_EM, whole, mode, combine)
    torch.testing.assert_close(torch.cat([part[0] for part in found]), out_BC)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), grad_BD)
    torch.testing.assert_close(torch.cat([part[2] for part in found]), grad_A)
    for name, expected in gradients.items():  # of copies the sum
        shares = [part[3][name] for part in found if name in part[3]]
        number = int(name.partition(".")[0])
        assert len(shares) == sum(share > 0 for share in share_EM[number])
        torch.testing.assert_close(sum(shares), expected)


def test_shares_must_be_those_of_the_group():
    in_processes(2, refuse_shares, [[0.5, 0.4], [1.0, 0.0]])
    in_processes(2, refuse_shares, [[1.0]])


def refuse_shares(world, shares):
    with pytest.raises(ValueError, match="do not sum to 1"):
        AllToAllDispatcher(dist.group.WORLD, shares, torch.device("cpu"))
