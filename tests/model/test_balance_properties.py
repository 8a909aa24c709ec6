"""Auxiliary losses at every gap between logits: values and gradients against derivatives in float64."""

import math

import pytest
import torch
from routing_helpers import listed_routing

from model.balance import BalanceConfig, balance_losses
from model.losses.base import squared_cv
from model.losses.entropy_global import global_divergence
from model.losses.entropy_local import local_entropy
from model.routers.noise import load_probability


def entropy64(p):
    """Entropy in float64 of probabilities, some of which may be 0."""
    return -torch.where(p > 0, p * p.clamp_min(1e-320).log(), 0.0).sum(dim=-1)


def softmax64(logits):
    """Probabilities in float64, from differences to the largest logit."""
    shifted = (logits - logits.max(dim=-1, keepdim=True).values).exp()
    return shifted / shifted.sum(dim=-1, keepdim=True)


def expected_loss_and_gradient(name, logits, counts_E):
    """Value and gradient at logits (B, E), float64, even target, costs 1 to E: the derivatives written out by hand."""
    batch, experts = logits.shape
    p, share = softmax64(logits), counts_E.double() / counts_E.sum()
    if name in ("switch", "p_penalty"):
        cost = torch.arange(1, experts + 1).double()
        slope = experts * share * (cost / cost.mean() if name == "p_penalty" else 1) / batch
        value, slope = (slope * p).sum(), slope.expand_as(p)
    elif name == "importance":  # of the gate's own probabilities
        total = p.sum(dim=0)
        value = experts * (total / batch).square().sum() - 1
        slope = (2 * experts * total / batch**2).expand_as(p)
    elif name == "entropy_local":
        value = entropy64(p).mean()
        surprise = -torch.where(p > 0, p.clamp_min(1e-320).log(), 0.0)
        return value, p * (surprise - entropy64(p)[:, None]) / batch
    elif name == "entropy_global":
        mean = p.mean(dim=0)
        value = math.log(experts) - entropy64(mean)
        slope = torch.where(mean > 0, mean.clamp_min(1e-320).log(), 0.0).expand_as(p) / batch
    else:  # z_loss
        lse = logits.logsumexp(dim=-1, keepdim=True)
        return lse.square().mean(), 2 * lse * p / batch
    return value, p * (slope - (p * slope).sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 30.0, 88.0, 105.0, 1e3, 1e4])
@pytest.mark.parametrize(
    "name", ["switch", "p_penalty", "importance", "entropy_local", "entropy_global", "z_loss", "usage_variance", "load"]
)
def test_losses_and_gradients_are_correct_at_every_gap_between_logits(name, gap):
    patterns = [
        [[gap, 0.0, 0.0]],  # one sample, one expert
        [[gap, 0.0, gap / 2], [gap, -gap, 0.0]],  # a collapsed gate
        [[gap, 0.0, 0.0], [0.0, gap, 0.0], [0.0, 0.0, gap]],  # decided and balanced
        [[0.0, 0.0, -gap], [0.5, 0.0, -gap]],  # an expert that no sample prefers
    ]
    for values in patterns:
        logits_BE = torch.tensor(values, requires_grad=True)
        expert_A = logits_BE.argmax(dim=-1)
        gate = {"importance_BE": logits_BE.softmax(dim=-1), "work_E": torch.tensor([0.5, 1.0, 1.5])}
        if name == "load":
            gate["load_BE"] = load_probability(logits_BE, logits_BE + 0.1, torch.full_like(logits_BE, 1e-6), 1)
        routing = listed_routing(torch.arange(len(values)), expert_A, torch.ones(len(values)), logits_BE, **gate)
        loss = balance_losses(routing, BalanceConfig(**{"switch": 0.0, name: 1.0}))[name]
        assert loss.isfinite()
        if name == "usage_variance":
            continue
        (gradient_BE,) = torch.autograd.grad(loss, logits_BE)
        assert gradient_BE.isfinite().all()
        if name == "load":
            continue
        value, expected_BE = expected_loss_and_gradient(name, logits_BE.detach().double(), routing.counts_E)
        assert loss.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
        scale = 1 + expected_BE.abs().max()
        assert ((gradient_BE - expected_BE).abs() / scale).max() < 1e-6


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-25, 1e-10, 1.0, 1e10, 1e25])
def test_the_coefficient_of_variation_does_not_depend_on_the_scale(size):
    values_E = torch.tensor([1.0, 3.0]).mul(size).requires_grad_()
    loss = squared_cv(values_E)
    (gradient_E,) = torch.autograd.grad(loss, values_E)
    assert loss.isfinite() and gradient_E.isfinite().all()
    if size > 1e-30:  # below this, the gate vanishes and the loss goes to 0
        assert loss.item() == pytest.approx(0.25)
        # d/da of (a - b)^2 / (a + b)^2 is 4 b (a - b) / (a + b)^3.
        assert gradient_E.mul(size).tolist() == pytest.approx([4 * 3 * -2 / 64, 4 * 1 * 2 / 64])


def test_an_excluded_expert_does_not_affect_the_entropies():
    logits_BE = torch.tensor([[0.0, 0.0, -math.inf]] * 2)
    assert local_entropy(logits_BE).item() == pytest.approx(math.log(2))
    assert global_divergence(logits_BE).item() == pytest.approx(math.log(3) - math.log(2))
