"""Where temperature, bias, noise and residual apply and where they do not, by hand."""

import math

import pytest
import torch
from routing_helpers import identity_router
from test_routers_rules import ONE_SAMPLE, logs
from test_routers_structured import TWO_LEVELS, hierarchical, soft

from model.losses.importance import importance_loss

# Temperature 1/2 doubles the logits, which squares the proportions of their exponentials.


@pytest.mark.parametrize(
    ("top_k", "top_groups", "experts", "weights"),
    [
        # Groups 9 : 1; in group 0 the experts 1 : 16, in group 1 they are 81 : 1.
        (1, 1, [1], [9 / 10 * 16 / 17]),
        (2, 1, [1, 0], [9 / 10 * 16 / 17, 9 / 10 * 1 / 17]),
        (2, 2, [1, 2], [9 / 10 * 16 / 17, 1 / 10 * 81 / 82]),
    ],
)
def test_temperature_divides_the_logits_of_both_levels_of_a_hierarchy(top_k, top_groups, experts, weights):
    routing = hierarchical(top_k, top_groups=top_groups, temperature=0.5)(TWO_LEVELS)
    assert routing.expert_A.tolist() == experts
    assert routing.weight_A.tolist() == pytest.approx(weights, abs=1e-6)


def test_temperature_divides_the_logits_of_expert_choice():
    router = identity_router("expert_choice", 2, 1, temperature=0.5).train()
    # Gates 81 : 1, 64 : 4, 36 : 16, 9 : 49; two samples each.
    x = logs([9.0, 1.0], [8.0, 2.0], [6.0, 4.0], [3.0, 7.0])
    routing = router(x)
    assert routing.sample_A.tolist() == [0, 1, 3, 2] and routing.expert_A.tolist() == [0, 0, 1, 1]
    assert routing.weight_A.tolist() == pytest.approx([81 / 82, 16 / 17, 49 / 58, 4 / 13], abs=1e-6)
    # In evaluation too, against thresholds which are gates: 16/17 = 0.941 is below 0.95, and 4/13 = 0.308 above 0.3.
    router.eval().threshold_E.copy_(torch.tensor([0.95, 0.3]))
    routing = router(x[:3])
    assert list(zip(routing.sample_A.tolist(), routing.expert_A.tolist(), strict=True)) == [(0, 0), (1, 0), (2, 1)]
    assert routing.weight_A.tolist() == pytest.approx([81 / 82, 16 / 17, 4 / 13], abs=1e-6)


def test_temperature_divides_the_logits_of_soft_moe():
    router = soft(temperature=0.5)
    with torch.no_grad():
        router.slots_DP.copy_(torch.eye(2))
        router.scale.fill_(math.log(3.0))
    # Three tokens, two along e0 and one along e1: their logits with their own slot are 2 log 3, with the other 0. Over
    # the tokens slot 0 mixes 9 : 9 : 1 and slot 1 mixes 1 : 1 : 9; over the slots a token has 9/10 and 1/10.
    routing = router(torch.tensor([[[4.0, 0.0], [2.0, 0.0], [0.0, 2.0]]]))
    assert routing.assignments.rows_AD.tolist() == [pytest.approx([54 / 19, 2 / 19]), pytest.approx([6 / 11, 18 / 11])]
    assert routing.weight_A.tolist() == pytest.approx([1.9 / 3, 1.1 / 3])


def test_temperature_divides_the_logits_of_vmoes_importance():
    routing = identity_router("vmoe", 4, 1, temperature=0.5).train()(ONE_SAMPLE.expand(3, 4))
    # Gates 1, 16, 9, 4 of 30; over their mean 7.5 they differ from 1 by 26, 34, 6 and 14 thirtieths:
    # (676 + 1156 + 36 + 196) / 900 / 4.
    assert importance_loss(routing).item() == pytest.approx(2064 / 3600, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "bias", "weights"),
    [
        # Scores sigmoid(log w) = w / (1 + w): 1/2, 4/5, 3/4, 2/3. With the bias 0, 1, 3, 2 are the order. Over their
        # sums (1/2, 4/5) / (13/10) and (3/4, 2/3) / (17/12).
        ("deepseek", 0.1, [5 / 13, 8 / 13, 9 / 17, 8 / 17]),
        # Scores 0, 1.386, 1.099, 0.693: with the bias 0, 1, 3, 2 as well. Weights in proportion to 1 : 4 and 3 : 2.
        ("mixtral", 0.5, [1 / 5, 4 / 5, 3 / 5, 2 / 5]),
        # The same, not renormalised.
        ("vmoe", 0.5, [0.1, 0.4, 0.3, 0.2]),
    ],
)
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_the_bias_enters_no_weight_under_capacities(kind, bias, weights, overflow):
    # One place each: sample 0 has its choices 0 and 1; sample 1, which wants the same, the next ones or none.
    options = {"noise_std": 0.0, "bias_rate": 1e-3, "capacity_factor": 0.5, "overflow": overflow}
    router = identity_router(kind, 4, 2, **options).train()
    router.bias_E.copy_(torch.tensor([10.0, 0.0, 0.0, bias]))
    routing = router(ONE_SAMPLE.expand(2, 4))
    found = dict(zip(routing.expert_A.tolist(), routing.weight_A.tolist(), strict=True))
    kept = 4 if overflow == "next_best" else 2
    assert routing.sample_A.tolist() == [0, 0, 1, 1][:kept] and sorted(found) == [0, 1, 2, 3][:kept]
    assert [found[expert] for expert in sorted(found)] == pytest.approx(weights[:kept], abs=1e-6)


@pytest.mark.parametrize("overflow", ["drop", "residual", "next_best"])
def test_the_bias_follows_requested_and_not_assigned_experts(overflow):
    router = identity_router("switch", 2, 1, bias_rate=0.01, jitter=0.0, capacity_factor=0.5, overflow=overflow).train()
    routing = router(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    # One place each. Three samples ask for expert 0 and one for expert 1: down, up. What found a place is even.
    assert routing.counts_E.tolist() == [1, 1]
    router.after_step(routing)
    assert router.bias_E.tolist() == pytest.approx([-0.01, 0.01])


def test_article_noise_has_a_minimum_standard_deviation():
    router = identity_router("article", 2, 1, noise_std=0.5).train()
    torch.manual_seed(0)
    # The spread of (s, 0) is s / sqrt 2 = 0.00035 for s = 0.0005, below 0.001: each noise is 0.0005, their difference
    # 0.0005 sqrt 2, and the smaller logit is chosen with probability Phi(-1 / sqrt 2) = 0.239750 instead of Phi(-2).
    logits = torch.tensor([[0.0005, 0.0]]).expand(100_000, 2)
    assert router(logits).expert_A.float().mean().item() == pytest.approx(0.23975, abs=0.005)
    # Logits that are all the same do not send every sample to the same expert.
    assert router(torch.zeros(100_000, 2)).expert_A.float().mean().item() == pytest.approx(0.5, abs=0.005)


def test_the_residual_replaces_drops_and_not_choices_that_gshard_did_not_draw():
    # Renormalised gates 0.8 and 0.2; places ceil(1000 * 2 * 0.75 / 3) = 500 each, so that expert 0 drops half of its
    # samples. About 400 draw their second expert, and all of them find a place.
    torch.manual_seed(0)
    router = identity_router("gshard", 3, 2, capacity_factor=0.75, overflow="residual").train()
    routing = router(logs([4.0, 1.0, 1e-6]).expand(1000, 3))
    counts = routing.counts_E.tolist()
    assert counts[0] == 500 and 300 < counts[1] < 500 and routing.dropped.item() == 500
    assert routing.drops.residual_B.tolist() == pytest.approx([0.0] * 500 + [0.8] * 500, abs=1e-6)
