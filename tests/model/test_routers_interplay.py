"""Combinations of options of the routing rules: bias and load estimate, temperature, capacities and losses."""

import math

import pytest
import torch
from routing_helpers import EVERY_LOSS
from test_routers_capacity import identity_router, pairs

from common.errors import UserError
from config.command_line import parse_command_line
from model.balance import balance_losses, weighted_sum
from model.losses.entropy_local import local_entropy
from model.losses.importance import importance_loss
from model.routers import RouterConfig, build_router
from model.routers.capacity import place


@pytest.mark.parametrize(
    ("kind", "options"),
    [("noisy_topk", {}), ("vmoe", {}), ("hierarchical", {"groups": 2}), ("hierarchical", {"groups": 4})],
)
def test_the_load_estimate_includes_the_bias(kind, options):
    torch.manual_seed(0)
    config = RouterConfig(kind=kind, top_k=2, norm="none", bias_rate=0.001, **options)
    router = build_router(config, 4, 8).train()
    torch.nn.init.zeros_(router.gate.weight)
    torch.nn.init.zeros_(router.gate.bias)
    router.bias_E.copy_(torch.tensor([-0.3, 0.3, 0.1, 0.0, 0.5, 0.2, -0.4, 0.0]))
    routing = router(torch.zeros(20_000, 4))
    chosen_E = routing.counts_E / 20_000
    assert chosen_E.max() - chosen_E.min() > 0.15
    assert routing.gate.load_BE.mean(dim=0).tolist() == pytest.approx(chosen_E.tolist(), abs=0.02)


@pytest.mark.parametrize("bias", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("noisy_topk", {}),
        ("vmoe", {"noise_std": 1.0}),
        ("hierarchical", {"groups": 2}),
        ("hierarchical", {"groups": 2, "top_groups": 2, "temperature": 0.2}),
        ("hierarchical", {"groups": 4}),
        ("hierarchical", {"groups": 3, "top_groups": 2}),
    ],
)
def test_the_load_estimate_sums_to_k_and_is_the_probability_of_being_chosen(kind, options, bias):
    torch.manual_seed(1)
    config = RouterConfig(kind=kind, top_k=2, norm="none", bias_rate=0.001, **options)
    router = build_router(config, 4, 12).train()
    torch.nn.init.normal_(router.gate.weight)
    router.bias_E.copy_(bias * torch.randn(12))
    routing = router(torch.full((20_000, 4), 0.5))
    chosen_E, load_E = routing.counts_E / 20_000, routing.gate.load_BE.mean(dim=0)
    assert load_E.sum().item() == pytest.approx(2, abs=0.012)
    assert load_E.tolist() == pytest.approx(chosen_E.tolist(), abs=0.012)


def test_an_ablation_of_a_sharp_hierarchical_gate_has_weights():
    # Two groups of one expert, both chosen: without expert 0 all weight is expert 1's.
    config = RouterConfig(kind="hierarchical", top_k=2, groups=2, top_groups=2, temperature=0.2, norm="none")
    router = build_router(config, 3, 2).eval()
    torch.nn.init.normal_(router.gate.weight)
    routing = router(torch.randn(5, 3), allowed_E=torch.tensor([False, True]))
    assert routing.weight_A[routing.expert_A == 1].tolist() == [1.0] * 5
    assert routing.weight_A[routing.expert_A == 0].tolist() == [0.0] * 5


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("kind", ["noisy_topk", "vmoe", "deepseek", "hierarchical", "expert_choice"])
def test_extreme_temperatures_give_finite_weights_and_gradients(kind, temperature):
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind=kind, top_k=2, temperature=temperature), 4, 4).train()
    torch.nn.init.normal_(router.gate.weight)
    routing = router(torch.randn(16, 4))
    (weighted_sum(balance_losses(routing, EVERY_LOSS), EVERY_LOSS) + routing.weight_A.sum()).backward()
    assert routing.weight_A.isfinite().all() and router.gate.weight.grad.isfinite().all()


def test_deepseek_weighs_by_ratio_where_all_scores_underflow():
    # Scores sigmoid(-200) and sigmoid(-201), both 0 in float32: e : 1.
    routing = identity_router("deepseek", 3, 2, bias_rate=0.0)(torch.tensor([[-201.0, -300.0, -200.0]]))
    assert pairs(routing) == [(0, 0), (0, 2)]
    assert sorted(routing.weight_A.tolist()) == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_a_replacement_can_be_a_choice_that_was_not_drawn():
    # Both samples want expert 0, which has one place, and neither has drawn its second choice, expert 1.
    expert_BR = torch.tensor([[0, 1, 0, 1, 2]] * 2)
    wanted_BK = torch.tensor([[True, False]] * 2)
    spare_BS = torch.tensor([[False, True, True]] * 2)
    placed = place(expert_BR, wanted_BK, torch.tensor([1, 1, 1]), None, spare_BS).tolist()
    assert placed == [[True, False, False, False, False], [False, False, False, True, False]]


def test_gshard_sends_a_sample_without_its_first_expert_to_its_second(monkeypatch):
    # ceil(2 * 2 * 0.25 / 3) = 1 place each. Gates .6 .3 .1 for both; no second choice is drawn.
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    x = torch.tensor([[0.6, 0.3, 0.1]] * 2).log()
    routing = identity_router("gshard", 3, 2, capacity_factor=0.25, overflow="next_best")(x)
    assert pairs(routing) == [(0, 0), (1, 1)]
    # The first keeps .6 / .9 whether the second is drawn or not; a replacement is all that the other sample has.
    assert routing.weight_A.tolist() == pytest.approx([2 / 3, 1.0])


@pytest.mark.parametrize("overflow", ["drop", "residual", "next_best"])
def test_importance_counts_requested_and_not_assigned_experts(overflow):
    x = torch.tensor([[0.5, 0.3, 0.2]] * 6).log()
    free = identity_router("mixtral", 3, 2)(x)
    tight = identity_router("mixtral", 3, 2, capacity_factor=0.5, overflow=overflow)(x)
    assert tight.counts_E.tolist() != free.counts_E.tolist()
    # Weights 5/8, 3/8, 0: mean 1/3, squared CV (25 + 9) / 64 * 3 - 1 = 19/32.
    assert importance_loss(tight).item() == pytest.approx(importance_loss(free).item()) == pytest.approx(19 / 32)


def test_losses_read_the_gate_at_its_temperature():
    # Logits log 16 and 0 at T = 2: gate 4/5 and 1/5.
    x = torch.tensor([[math.log(16), 0.0]])
    for kind in ("switch", "expert_choice"):
        routing = identity_router(kind, 2, 1, temperature=2.0)(x)
        assert routing.probs_BE[0].tolist() == pytest.approx([0.8, 0.2])
        entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
        assert local_entropy(routing.gate_logits_BE).item() == pytest.approx(entropy)
        assert routing.logits_BE[0].tolist() == x[0].tolist()  # the z-loss keeps these small


def test_the_temperature_of_a_hierarchical_gate_is_that_of_both_levels():
    torch.manual_seed(0)
    options = {"kind": "hierarchical", "top_k": 4, "top_groups": 2, "norm": "none", "temperature": 3.0}
    router = build_router(RouterConfig(**options), 6, 4).eval()
    torch.nn.init.normal_(router.gate.weight)
    routing = router(torch.randn(5, 6))  # all experts of both groups: the weights are the gate
    weight_BE = torch.zeros(5, 4).index_put((routing.sample_A, routing.expert_A), routing.weight_A)
    torch.testing.assert_close(routing.probs_BE, weight_BE)


def test_priority_goes_by_the_gate_at_its_temperature():
    # One place. Largest gates of the two at T = 1: .576 and .523; at T = 100: .3356 and .3390.
    x = torch.tensor([[2.0, 1.0, 1.0], [2.0, -3.0, 1.9]])
    kept = []
    for temperature in (1.0, 100.0):
        options = {"capacity_factor": 0.5, "capacity_order": "priority", "temperature": temperature}
        kept.append(pairs(identity_router("vmoe", 3, 1, **options)(x)))
    assert kept == [[(0, 0)], [(1, 0)]]


def test_the_load_loss_is_rejected_exactly_for_rules_without_noise():
    words = ["--config", "configs/digits.yaml", "--balance.load", "0.1", "--router.noise_std", "0"]
    assert parse_command_line([*words, "--router.kind", "noisy_topk"]).config.balance.load == 0.1
    with pytest.raises(UserError, match=r"set it to 0, or router\.noise_std above 0"):
        parse_command_line([*words, "--router.kind", "vmoe"])
    with pytest.raises(UserError, match=r"or router\.kind noisy_topk"):
        parse_command_line([*words, "--router.kind", "mixtral"])


def test_an_order_without_capacities_is_reported():
    assert RouterConfig(capacity_order="priority").idle == [
        "router.capacity_order priority has no effect without router.capacity_factor"
    ]
    assert RouterConfig(capacity_order="priority", capacity_factor=1.0).idle == []
    assert len(RouterConfig(kind="expert_choice", capacity_order="priority", capacity_factor=1.0).idle) == 1
