"""Auxiliary losses against numbers worked out by hand, their values at perfect balance, and their gradients."""

import math
from dataclasses import replace

import pytest
import torch
from routing_helpers import listed_routing

from model.balance import BalanceConfig, balance_losses, floors, weighted_sum
from model.losses.base import squared_cv
from model.losses.entropy_global import global_divergence
from model.losses.entropy_local import local_entropy
from model.losses.importance import importance_loss
from model.losses.load import load_loss
from model.losses.p_penalty import parameter_penalty
from model.losses.switch import switch_balance
from model.losses.usage_variance import usage_variance
from model.losses.z_loss import z_loss
from model.old_gate import OldGate
from model.routers import RouterConfig, build_router


def routing_of(expert_A, weight_A, logits_BE, load_BE=None):
    top_k = len(expert_A) // len(logits_BE)
    sample_A = torch.arange(len(logits_BE)).repeat_interleave(top_k)
    return listed_routing(sample_A, torch.tensor(expert_A), torch.tensor(weight_A), logits_BE, load_BE=load_BE)


def test_squared_cv_uses_the_population_variance():
    # Mean 2, deviations -1 and 1, population variance 1: 1 / 4. (Bessel's correction would give 1 / 2.)
    assert squared_cv(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert squared_cv(torch.tensor([7.0])).item() == 0.0
    assert squared_cv(torch.zeros(3)).item() == 0.0


def test_importance_loss_by_hand():
    routing = routing_of([0, 1, 0, 1], [0.75, 0.25, 0.75, 0.25], torch.zeros(2, 2))
    # Importance (1.5, 0.5): mean 1, population variance 0.25.
    assert importance_loss(routing).item() == pytest.approx(0.25)


def test_load_loss_by_hand_and_without_noise():
    load = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    # Column sums (1.6, 0.4): mean 1, population variance 0.36.
    assert load_loss(routing_of([0, 0], [1.0, 1.0], torch.zeros(2, 2), load)).item() == pytest.approx(0.36)
    assert load_loss(routing_of([0, 0], [1.0, 1.0], torch.zeros(2, 2))).item() == 0.0


def test_switch_balance_by_hand():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    # Shares (3/4, 1/4), mean probabilities (0.7, 0.3): 2 * (0.525 + 0.075) = 1.2.
    assert switch_balance(probs, torch.tensor([3, 1])).item() == pytest.approx(1.2)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (8, 8)])
def test_values_at_perfect_balance(num_experts, top_k):
    counts = torch.full((num_experts,), 6 * top_k)
    assert switch_balance(torch.full((9, num_experts), 1 / num_experts), counts).item() == pytest.approx(1.0)
    assert squared_cv(counts.float()).item() == 0.0
    assert usage_variance(counts).item() == pytest.approx(0.0)


def test_z_loss_by_hand():
    # logsumexp(0, 0) = log 2; logsumexp(log 3, 0) = log 4: the mean of their squares.
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_usage_variance_by_hand():
    # Shares (0.75, 0.25): mean 0.5, population variance 0.0625.
    assert usage_variance(torch.tensor([3, 1])).item() == pytest.approx(0.0625)


def test_a_target_load_changes_the_balance_point():
    target = torch.tensor([0.75, 0.25])
    # Shares (1/2, 1/2): 3/4 (2/3 - 1)^2 + 1/4 (2 - 1)^2 = 1/12 + 1/4 = 1/3.
    assert squared_cv(torch.tensor([5.0, 5.0]), target).item() == pytest.approx(1 / 3)
    assert squared_cv(torch.tensor([6.0, 2.0]), target).item() == pytest.approx(0.0)
    probs = torch.tensor([[0.5, 0.5]])
    # Shares (3/4, 1/4) and probabilities 1/2: 3/4 * 1/2 / (3/4) + 1/4 * 1/2 / (1/4) = 1.
    assert switch_balance(probs, torch.tensor([3, 1]), target).item() == pytest.approx(1.0)
    # Shares (1/2, 1/2): 1/4 / (3/4) + 1/4 / (1/4) = 4/3.
    assert switch_balance(probs, torch.tensor([2, 2]), target).item() == pytest.approx(4 / 3)
    # 1/2 log (1/2 / (3/4)) + 1/2 log (1/2 / (1/4)) = (log 2/3 + log 2) / 2.
    assert global_divergence(probs.log(), target).item() == pytest.approx((math.log(2 / 3) + math.log(2)) / 2)
    even = torch.tensor([0.5, 0.5])
    values = torch.rand(2)
    assert squared_cv(values).item() == pytest.approx(squared_cv(values, even).item())


def test_parameter_penalty_by_hand():
    # Costs 1 and 3 over their mean 2. Shares (1/2, 1/2), probabilities (0.6, 0.4): 2 (1/2 1/2 0.6 + 1/2 3/2 0.4) = 0.9.
    work, probs = torch.tensor([0.5, 1.5]), torch.tensor([[0.6, 0.4]])
    assert parameter_penalty(probs, torch.tensor([2, 2]), work).item() == pytest.approx(0.9)
    # Least at shares and probabilities in proportion to 1/cost, (3/4, 1/4): 2 (1/2 9/16 + 3/2 1/16) = 3/4.
    least = parameter_penalty(torch.tensor([[0.75, 0.25]]), torch.tensor([3, 1]), work).item()
    assert least == pytest.approx(0.75)
    for share in torch.linspace(0, 1, 101).tolist():
        probs = torch.tensor([[share, 1 - share]])
        assert parameter_penalty(probs, probs[0], work).item() >= least - 1e-6


def test_entropies_by_hand():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    # Entropies 0 and log 2; mean gate (3/4, 1/4), of entropy 0.562335.
    assert local_entropy(probs.log()).item() == pytest.approx(math.log(2) / 2)
    assert global_divergence(probs.log()).item() == pytest.approx(math.log(2) - 0.562335, abs=1e-6)


@pytest.mark.parametrize("target", ["even", "size", "inverse_size", [5.0, 1.0, 1.0]])
def test_every_floor_is_the_value_at_perfect_balance(target):
    config = BalanceConfig(**dict.fromkeys(vars(BalanceConfig()), 1.0))
    router = build_router(RouterConfig(target_load=target), 4, 3, work=[1.0, 2.0, 3.0])
    floor = floors(config, router)
    assert list(floor) == list(vars(config))
    share_E = router.target_E
    expert_A = torch.repeat_interleave(torch.arange(3), (share_E * 6 * 7 * 11).round().long())  # whole counts
    ones_A = torch.ones(len(expert_A))
    logits_BE = share_E.log().expand(len(expert_A), 3)  # of logsumexp 0
    aim = {"target_E": router.target_E, "work_E": router.work_E}
    samples_A = torch.arange(len(expert_A))
    routing = listed_routing(samples_A, expert_A, ones_A, logits_BE, load_BE=logits_BE.exp(), old_BE=logits_BE, **aim)
    found = balance_losses(routing, config)
    for name in ("switch", "importance", "load", "z_loss", "entropy_global", "old_gate"):
        assert found[name].item() == pytest.approx(floor[name], abs=1e-4), name
    if target == "inverse_size":
        assert found["p_penalty"].item() == pytest.approx(floor["p_penalty"], abs=1e-4)
    if target == "even":
        assert found["usage_variance"].item() == pytest.approx(floor["usage_variance"], abs=1e-6)
    assert floors(BalanceConfig(switch=0.0, z_loss=0.1), router) == {"z_loss": 0.0}


@pytest.mark.parametrize("name", [name for name in vars(BalanceConfig()) if name != "usage_variance"])
def test_losses_have_the_gradient_of_finite_differences(name):
    torch.manual_seed(0)
    config = BalanceConfig(**{"switch": 0.0, name: 1.0})
    router = build_router(RouterConfig(kind="noisy_topk", top_k=2, norm="none", target_load=[1.0, 2.0, 3.0]), 3, 3)
    router, old_BE = router.double().train(), torch.randn(5, 3, dtype=torch.float64)

    def loss(logits):
        torch.manual_seed(1)  # the same noise each time
        routing = router._route(logits, torch.nn.functional.softplus(logits))
        routing = replace(routing, gate=replace(routing.gate, old_BE=old_BE))
        return balance_losses(routing, config)[name]

    assert torch.autograd.gradcheck(loss, (torch.randn(5, 3, dtype=torch.float64, requires_grad=True),))


def load_after_minimising(target="even", **weights):
    """Load of three experts, of work 1, 2 and 3, after a gate has learned nothing but the loss of these weights."""
    torch.manual_seed(0)
    config = RouterConfig(kind="noisy_topk", top_k=1, target_load=target)
    router = build_router(config, 8, 3, work=[1.0, 2.0, 3.0]).train()
    balance = BalanceConfig(**{"switch": 0.0, **weights})
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    x = torch.randn(256, 8)
    for _ in range(100):
        optimizer.zero_grad()
        weighted_sum(balance_losses(router(x), balance), balance).backward()
        optimizer.step()
    counts = sum(router(x).counts_E for _ in range(20))
    return (counts / counts.sum()).tolist()


@pytest.mark.parametrize(
    ("target", "expected"), [("size", [1 / 6, 2 / 6, 3 / 6]), ("inverse_size", [6 / 11, 3 / 11, 2 / 11])]
)
@pytest.mark.parametrize("name", ["switch", "importance", "load", "entropy_global"])
def test_minimising_a_loss_brings_the_load_to_its_target(name, target, expected):
    assert load_after_minimising(target, **{name: 1.0}) == pytest.approx(expected, abs=0.06)


def test_the_parameter_penalty_prefers_small_experts():
    assert load_after_minimising(p_penalty=1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.06)  # equal work


def test_which_losses_reach_the_gate():
    torch.manual_seed(0)
    reached = {}
    for name in vars(BalanceConfig()):
        router = build_router(RouterConfig(kind="noisy_topk", top_k=2), 6, 4).train()
        config = BalanceConfig(switch=0.0) if name != "switch" else BalanceConfig(switch=1.0)
        setattr(config, name, 1.0)
        router.old = OldGate(router, 4)
        torch.nn.init.normal_(router.gate.weight)
        losses = balance_losses(router(torch.randn(32, 6)), config)
        assert list(losses) == [name]
        reached[name] = losses[name].requires_grad
    # The reference recipe's usage variance is built from counts: it has no gradient and balances nothing.
    assert reached == {name: name != "usage_variance" for name in vars(BalanceConfig())}


@pytest.mark.parametrize("name", ["switch", "importance", "load"])
def test_minimising_a_balance_loss_balances_the_load(name):
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind="noisy_topk", top_k=1), 8, 4).train()
    with torch.no_grad():
        router.gate.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    config = BalanceConfig(**{"switch": 0.0, name: 1.0})
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    x = torch.randn(256, 8)
    before = squared_cv(router(x).counts_E.float()).item()
    for _ in range(200):
        optimizer.zero_grad()
        weighted_sum(balance_losses(router(x), config), config).backward()
        optimizer.step()
    assert before > 1.0
    assert squared_cv(router(x).counts_E.float()).item() < 0.1


def test_weighted_sum():
    config = BalanceConfig(switch=0.5, z_loss=0.1)
    assert weighted_sum({"switch": torch.tensor(2.0), "z_loss": torch.tensor(3.0)}, config).item() == pytest.approx(1.3)


def test_random_warm_up_does_not_train_the_gate_to_balance_it():
    router = build_router(RouterConfig(kind="noisy_topk", top_k=2), 6, 4).train()
    config = BalanceConfig(switch=1.0, importance=1.0, load=1.0, z_loss=1.0)
    assert list(balance_losses(router(torch.randn(8, 6), warmup=True), config)) == ["z_loss"]
