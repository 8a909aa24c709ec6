"""Auxiliary losses against numbers worked out by hand, their values at perfect balance, and their gradients."""

import math

import pytest
import torch

from model.balance import (
    BalanceConfig,
    balance_losses,
    importance_loss,
    load_loss,
    squared_cv,
    switch_balance,
    usage_variance,
    weighted_sum,
    z_loss,
)
from model.routers import RouterConfig, Routing, build_router


def routing_of(expert_A, weight_A, logits_BE, load_BE=None):
    top_k = len(expert_A) // len(logits_BE)
    sample_A = torch.arange(len(logits_BE)).repeat_interleave(top_k)
    return Routing(sample_A, torch.tensor(expert_A), torch.tensor(weight_A), logits_BE, load_BE)


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


def test_which_losses_reach_the_gate():
    torch.manual_seed(0)
    reached = {}
    for name in ("switch", "importance", "load", "z_loss", "usage_variance"):
        router = build_router(RouterConfig(kind="noisy_topk", top_k=2), 6, 4).train()
        config = BalanceConfig(switch=0.0) if name != "switch" else BalanceConfig(switch=1.0)
        setattr(config, name, 1.0)
        torch.nn.init.normal_(router.gate.weight)
        losses = balance_losses(router(torch.randn(32, 6)), config)
        assert list(losses) == [name]
        reached[name] = losses[name].requires_grad
    # The reference recipe's usage variance is built from counts: it has no gradient and balances nothing.
    expected = {"switch": True, "importance": True, "load": True, "z_loss": True, "usage_variance": False}
    assert reached == expected


@pytest.mark.parametrize("name", ["switch", "importance", "load"])
def test_minimising_a_balance_loss_evens_the_load(name):
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind="noisy_topk", top_k=1), 8, 4).train()
    with torch.no_grad():
        router.gate.bias.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))
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
