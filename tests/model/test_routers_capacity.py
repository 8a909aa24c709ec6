"""Capacity: the assignment of slots, its order, and the treatment of drops, by hand and against a slow loop."""

import math
from fractions import Fraction

import pytest
import torch

from model.balance import BalanceConfig, balance_losses
from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import RouterConfig, build_router
from model.routers.capacity import exact, expert_capacity, place


def identity_router(kind, num_experts, top_k, **options):
    """A router in training mode, without noise or jitter, whose clean logits equal its input."""
    config = RouterConfig(kind=kind, top_k=top_k, norm="none", noise_std=0.0, jitter=0.0, **options)
    router = build_router(config, num_experts, num_experts)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(num_experts))
        router.gate.bias.zero_()
    return router.train()


def pairs(routing):
    return sorted(zip(routing.sample_A.tolist(), routing.expert_A.tolist(), strict=True))


def places(batch, factor, target, top_k=1):
    """Slots of each expert, as computed by a router from its options."""
    router = build_router(RouterConfig(kind="vmoe", top_k=top_k, target_load=target, capacity_factor=factor), 4, 4)
    return expert_capacity(batch, top_k * exact(router.capacity_factor), router.shares)


@pytest.mark.parametrize(
    ("batch", "top_k", "factor", "target", "expected"),
    [
        (10, 1, 1.25, "even", [4] * 4),  # 12.5 / 4 = 3.125, rounded up
        (30, 1, 1.0, [0.1, 0.2, 0.3, 0.4], [3, 6, 9, 12]),  # though the float 0.1 is more than a tenth
        (192, 2, 1.1, [1, 1, 2, 2], [71, 71, 141, 141]),  # 422.4 / 6 = 70.4 and twice that
        (8, 1, 1.0, [5, 1, 1, 1], [5, 1, 1, 1]),
        (1, 1, 0.1, "even", [1] * 4),  # never none
        (7, 4, 1e300, "even", [7] * 4),  # a sample comes to an expert once
        (7, 4, 1e-300, "even", [1] * 4),
        (4_000_000, 1, 1.0, "even", [1_000_000] * 4),
        (4_000_000, 1, 1.25, "even", [1_250_000] * 4),
        (4_000_000, 2, 0.75, "even", [1_500_000] * 4),
        (3_999_999, 1, 1.0, "even", [1_000_000] * 4),
        (4_000_001, 1, 1.0, "even", [1_000_001] * 4),
    ],
)
def test_capacity_by_hand(batch, top_k, factor, target, expected):
    assert places(batch, factor, target, top_k) == expected


@pytest.mark.parametrize("factor", [1.0, 1.25, 1.5])
def test_one_expert_has_a_slot_for_each_of_a_million_samples(factor):
    assert expert_capacity(1_000_000, exact(factor), [Fraction(1)]) == [1_000_000]
    # Of two experts each takes half, times the factor.
    assert expert_capacity(1_000_000, exact(factor), [Fraction(1, 2)] * 2) == [int(500_000 * factor)] * 2


@pytest.mark.parametrize("kind", ["vmoe", "gshard", "expert_choice"])
@pytest.mark.parametrize("factor", [1e300, 1e-300])
def test_extreme_capacity_factors_limit_nothing_or_leave_one_slot(kind, factor):
    if kind == "expert_choice" and factor > 1:
        with pytest.raises(ValueError, match="lower it"):
            identity_router(kind, 3, 2, capacity_factor=factor)
        return
    counts_E = identity_router(kind, 3, 2, capacity_factor=factor)(torch.randn(6, 3)).counts_E
    assert counts_E.max() == 1 if factor < 1 else 6 <= counts_E.sum() <= 12


def slow_place(experts, wanted, capacity, priority):
    """The definition: in rounds, by priority, one sample after another."""
    room, got = list(capacity), [[False] * len(row) for row in experts]
    order = sorted(range(len(experts)), key=lambda b: 0 if priority is None else -priority[b])
    for turn in range(len(experts[0])):
        for b in order:
            missing = sum(wanted[b]) - sum(got[b])
            asks = wanted[b][turn] if turn < len(wanted[b]) else missing > 0
            if asks and room[experts[b][turn]] > 0:
                room[experts[b][turn]] -= 1
                got[b][turn] = True
    return got


@pytest.mark.parametrize("seed", range(20))
def test_slots_equal_those_of_a_slow_loop(seed):
    torch.manual_seed(seed)
    num_experts, batch = int(torch.randint(1, 7, ())), int(torch.randint(1, 30, ()))
    k = int(torch.randint(1, num_experts + 1, ()))
    rounds = num_experts if seed % 2 else k
    expert_BR = torch.rand(batch, num_experts).argsort(dim=1)[:, :rounds]
    wanted_BK = torch.rand(batch, k) < 0.8
    capacity_E = torch.randint(1, max(2, batch * k // num_experts + 2), (num_experts,))
    priority_B = torch.rand(batch) if seed % 3 else None
    expected = slow_place(
        expert_BR.tolist(), wanted_BK.tolist(), capacity_E.tolist(), None if priority_B is None else priority_B.tolist()
    )
    assert place(expert_BR, wanted_BK, capacity_E, priority_B).tolist() == expected


def test_first_choices_come_before_second_choices():
    # Capacity ceil(2 * 2 * 0.5 / 2) = 1. Sample 0 wants 0 then 1; sample 1 wants 1 then 0. Each keeps its first choice:
    # going sample by sample, the second choice of sample 0 would have taken the place of sample 1's first.
    routing = identity_router("vmoe", 2, 2, capacity_factor=0.5)(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert pairs(routing) == [(0, 0), (1, 1)]
    assert routing.dropped.item() == 2
    assert routing.demand_E.tolist() == [2, 2] and routing.counts_E.tolist() == [1, 1]


@pytest.mark.parametrize(("order", "kept"), [("position", [0, 1]), ("priority", [1, 3])])
def test_batch_prioritised_order_ranks_by_the_largest_gate(order, kept):
    # All four want expert 0, which has ceil(4 / 2) = 2 places. Gates .6, .9, .7, .8.
    x = torch.tensor([[6.0, 4.0], [9.0, 1.0], [7.0, 3.0], [8.0, 2.0]]).log()
    routing = identity_router("switch", 2, 1, capacity_factor=1.0, capacity_order=order)(x)
    assert sorted(routing.sample_A.tolist()) == kept
    assert set(routing.expert_A.tolist()) == {0}


@pytest.mark.parametrize("shifts", [(0.0, 0.0, 0.0), (-100.0, -100.0, -100.0), (10.0, -10.0, 5.0)])
def test_slots_are_assigned_by_probability_whatever_the_offset_of_the_logits(shifts):
    # A rank by zero-filled logits would put every zero above chosen negative ones, and one by logits the sample that
    # is shifted up above the others.
    x = torch.tensor([[3.0, 1.0, 0.0], [5.0, 1.0, 0.0], [4.0, 0.0, 1.0]]) + torch.tensor(shifts)[:, None]
    router = identity_router("vmoe", 3, 1, capacity_factor=1.0, capacity_order="priority")
    routing = router(x)  # one place each: sample 1 has the largest gate for expert 0
    assert pairs(routing) == [(1, 0)]
    assert routing.dropped.item() == 2


def test_next_best_moves_a_choice_to_the_next_expert_with_a_free_slot():
    # One place each. All prefer 0, then 1, then 2; the last sample prefers 1, then 0, then 2, and its first choice
    # comes before the others' replacements.
    x = torch.tensor([[4.0, 3.0, 2.0], [4.0, 3.0, 2.0], [3.0, 4.0, 2.0]]).log()
    routing = identity_router("switch", 3, 1, capacity_factor=1.0, overflow="next_best")(x)
    assert pairs(routing) == [(0, 0), (1, 2), (2, 1)]
    assert routing.dropped.item() == 0
    # Sample 1 gives expert 2 its own gate for it, 2 / 9.
    assert routing.weight_A[routing.sample_A == 1].item() == pytest.approx(2 / 9)
    assert routing.demand_E.tolist() == [2, 1, 0]


def test_next_best_renormalises_over_the_assigned_experts():
    # Capacity ceil(2 * 2 * 0.5 / 4) = 1; both samples want 0 and 1. Sample 0 gets them; sample 1 gets 2 and 3.
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log().expand(2, 4)
    routing = identity_router("mixtral", 4, 2, capacity_factor=0.5, overflow="next_best")(x)
    assert pairs(routing) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    second = routing.sample_A == 1
    assert routing.weight_A[second].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_capacities_follow_the_target_load():
    x = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    router = identity_router("mixtral", 2, 2, capacity_factor=0.5, target_load=[3.0, 1.0])
    assert router(x).counts_E.tolist() == [6, 2]


def test_evaluation_and_warm_up_drop_nothing():
    router = identity_router("switch", 4, 1, capacity_factor=0.25)
    x = torch.tensor([[5.0, 0.0, 0.0, 0.0]]).expand(16, 4)
    assert len(router(x).sample_A) == 1
    assert len(router(x, warmup=True).sample_A) == 16
    assert len(router.eval()(x).sample_A) == 16


def test_balance_is_measured_before_drops():
    router = identity_router("switch", 2, 1, capacity_factor=0.5)
    routing = router(torch.tensor([[9.0, 1.0], [9.0, 1.0], [9.0, 1.0], [1.0, 9.0]]).log())
    assert routing.counts_E.tolist() == [1, 1] and routing.demand_E.tolist() == [3, 1]
    # Three of four asked for expert 0; mean probabilities (2.8, 1.2) / 4 = (0.7, 0.3): 2 (3/4 0.7 + 1/4 0.3) = 1.2.
    # Counted after the drops it would be 2 (1/2 0.7 + 1/2 0.3) = 1.
    assert balance_losses(routing, BalanceConfig())["switch"].item() == pytest.approx(1.2)


def test_residual_replaces_a_dropped_expert_by_a_linear_head_in_training_only():
    torch.manual_seed(0)
    config = RouterConfig(kind="switch", top_k=1, capacity_factor=0.25, overflow="residual", jitter=0.0, norm="none")
    moe = MixtureOfExperts(4, 3, config, ExpertsConfig(sizes=[[5], [6]], dropout=0.0)).train()
    x = torch.randn(8, 4)
    logits, routing = moe(x)
    dropped = torch.ones(8, dtype=torch.bool).index_fill(0, routing.sample_A, False)
    assert 6 <= dropped.sum() == routing.dropped
    probability = routing.probs_BE.amax(dim=1)  # the weight that the expert would have had
    torch.testing.assert_close(logits[dropped], (probability[:, None] * moe.skip(x))[dropped])
    logits[dropped].sum().backward()
    assert moe.skip.weight.grad.abs().sum() > 0 and moe.router.gate.weight.grad.abs().sum() > 0
    assert moe.eval()(x)[1].drops is None


def test_drops_are_counted_for_the_trainer():
    router = identity_router("vmoe", 3, 2, capacity_factor=0.5)
    routing = router(torch.randn(12, 3))
    assert routing.dropped.dtype == torch.int64 and routing.dropped.ndim == 0
    assert routing.dropped.item() == 24 - len(routing.sample_A) > 0
    assert routing.counts_E.max() <= math.ceil(12 * 2 * 0.5 / 3)
