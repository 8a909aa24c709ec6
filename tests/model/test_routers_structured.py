"""Hierarchical, expert choice, hash and soft routing against numbers worked out by hand."""

import math

import pytest
import torch
from routing_helpers import identity_router
from test_routers_rules import logs

from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import RouterConfig, build_router


def hierarchical(top_k, **options):
    """Two groups of two experts whose input is [group logits, expert logits]."""
    config = RouterConfig(kind="hierarchical", top_k=top_k, norm="none", groups=2, **options)
    router = build_router(config, 6, 4)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(6))
    return router.eval()


# Groups 3 : 1; in group 0 the experts 1 : 4, in group 1 they are 9 : 1.
TWO_LEVELS = logs([3.0, 1.0, 1.0, 4.0, 9.0, 1.0])


@pytest.mark.parametrize(
    ("top_k", "top_groups", "experts", "weights"),
    [
        (1, 1, [1], [0.75 * 0.8]),  # P(group 0) P(expert 1 | group 0)
        (2, 1, [1, 0], [0.75 * 0.8, 0.75 * 0.2]),  # one group, both of its experts
        (2, 2, [1, 2], [0.75 * 0.8, 0.25 * 0.9]),  # both groups, the best of each
        (4, 2, [1, 0, 2, 3], [0.6, 0.15, 0.225, 0.025]),
    ],
)
def test_hierarchical_weights_by_hand(top_k, top_groups, experts, weights):
    routing = hierarchical(top_k, top_groups=top_groups)(TWO_LEVELS)
    assert routing.expert_A.tolist() == experts
    assert routing.weight_A.tolist() == pytest.approx(weights, abs=1e-6)
    # The joint probabilities are the softmax of the logits, and the z-loss sees the groups: log (3 + 1).
    assert routing.probs_BE[0].tolist() == pytest.approx([0.15, 0.6, 0.225, 0.025], abs=1e-6)
    assert routing.logits_BE.logsumexp(dim=1).item() == pytest.approx(math.log(4.0), abs=1e-6)


def test_hierarchical_choice_is_not_the_top_k_of_the_joint_probability():
    # The group of expert 2 wins 5 : 4, though expert 0, alone in weight in its group, is the likelier one.
    x = logs([4.0, 5.0, 1.0, 1e-9, 1.0, 1.0])
    routing = hierarchical(1)(x)
    assert routing.probs_BE[0].argmax().item() == 0
    assert routing.expert_A.item() in (2, 3)


def test_hierarchical_load_is_the_probability_of_being_chosen_and_sums_to_k():
    torch.manual_seed(0)
    for top_k, top_groups in ((1, 1), (2, 2), (2, 1)):
        router = hierarchical(top_k, top_groups=top_groups).train()
        with torch.no_grad():
            router.noise.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        routing = router(TWO_LEVELS.expand(50_000, 6) * 0.5)
        assert routing.gate.load_BE.sum(dim=1).mean().item() == pytest.approx(top_k, abs=0.02)
        chosen_E = routing.counts_E / 50_000
        assert routing.gate.load_BE.mean(dim=0).tolist() == pytest.approx(chosen_E.tolist(), abs=0.015)


def test_both_levels_of_a_hierarchy_learn_from_one_choice():
    router = hierarchical(1)
    router(TWO_LEVELS).weight_A.sum().backward()
    # Rows 0 and 1 of the gate are the groups, 2 and 3 the experts of the group that was chosen.
    assert (router.gate.weight.grad.abs().sum(dim=1) > 1e-3).tolist() == [True, True, True, True, False, False]


def test_expert_choice_by_hand():
    router = identity_router("expert_choice", 2, 1).train()
    # Gates of expert 0: 0.9, 0.8, 0.6, 0.3; C = 4 * 1 / 2 = 2 samples each.
    x = logs([9.0, 1.0], [8.0, 2.0], [6.0, 4.0], [3.0, 7.0])
    routing = router(x)
    assert routing.expert_A.tolist() == [0, 0, 1, 1]
    assert routing.sample_A.tolist() == [0, 1, 3, 2]
    assert routing.weight_A.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.4], abs=1e-6)
    assert routing.dropped.item() == 0
    # Thresholds: a tenth of the way from 0 to the smallest gate taken, 0.8 and 0.4.
    assert router.threshold_E.tolist() == pytest.approx([0.08, 0.04], abs=1e-6)
    # c = 1/2: one sample each; samples 1 and 2 are seen by nobody.
    half = identity_router("expert_choice", 2, 1, capacity_factor=0.5).train()(x)
    assert (half.sample_A.tolist(), half.dropped.item()) == ([0, 3], 2)


def test_expert_choice_evaluates_each_sample_independently():
    router = identity_router("expert_choice", 2, 1)
    router.threshold_E.copy_(torch.tensor([0.75, 0.35]))
    # Gates .9 .1 pass the first; .6 .4 the second, though the first is larger; .7 .3 neither: the larger one then.
    routing = router(logs([9.0, 1.0], [6.0, 4.0], [7.0, 3.0]))
    assert list(zip(routing.sample_A.tolist(), routing.expert_A.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 0)]
    assert routing.weight_A.tolist() == pytest.approx([0.9, 0.4, 0.7], abs=1e-6)


def test_expert_choice_uses_about_as_many_experts_per_sample_in_evaluation_as_in_training():
    torch.manual_seed(0)
    router = identity_router("expert_choice", 4, 2).train()
    for _ in range(100):
        trained = router(torch.randn(256, 4))
    evaluated = router.eval()(torch.randn(4000, 4))
    assert len(trained.sample_A) / 256 == 2
    assert len(evaluated.sample_A) / 4000 == pytest.approx(2, abs=0.1)
    assert (evaluated.counts_E / len(evaluated.sample_A)).tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_expert_choice_trains_to_a_given_load():
    router = identity_router("expert_choice", 2, 1, target_load=[3.0, 1.0]).train()
    assert router(torch.randn(8, 2)).counts_E.tolist() == [6, 2]


def test_hash_is_fixed_balanced_and_without_parameters():
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind="hash", top_k=1), 16, 4).train()
    assert not list(router.parameters())
    mean = 5 * torch.randn(16)  # what all samples share must not send them all to one expert
    x = torch.randn(2000, 16) + mean
    for _ in range(200):
        router(x[torch.randperm(2000)[:256]])
    fixed = build_router(RouterConfig(kind="hash", top_k=1), 16, 4)
    fixed.load_state_dict(router.state_dict())
    assert torch.equal(fixed.eval()(x).expert_A, router.eval()(x).expert_A)
    assert (router(x).counts_E / 2000).tolist() == pytest.approx([0.25] * 4, abs=0.06)
    # Training and evaluation agree about a sample, regardless of its batch and of warm-up.
    alike = x[router.eval()(x).expert_A == 0]
    trained = router.train()(alike).expert_A
    assert torch.equal(trained, router.eval()(alike).expert_A)
    alone = router.train()(x[:1], warmup=True)
    assert alone.learned and alone.expert_A.tolist() == router.eval()(x[:1]).expert_A.tolist()


def test_hash_weights_are_equal():
    router = build_router(RouterConfig(kind="hash", top_k=3), 5, 4)
    assert router(torch.randn(7, 5)).weight_A.tolist() == pytest.approx([1 / 3] * 21)


def soft(num_experts=2, slots=1, width=2, **options):
    config = RouterConfig(kind="soft_moe", top_k=1, slots=slots, **options)
    return build_router(config, width, num_experts)


def test_soft_moe_by_hand():
    router = soft()
    with torch.no_grad():
        router.slots_DP.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))  # unit vectors e0, e1 once normalised
        router.scale.fill_(math.log(3.0))
    # Tokens of length 4 and 2 along e0 and e1: normalised, their logits are log 3 with their own slot and 0 with the
    # other. Dispatch over the tokens: 3/4 and 1/4; combine over the slots the same.
    routing = router(torch.tensor([[[4.0, 0.0], [0.0, 2.0]]]))
    assert routing.assignments.rows_AD.tolist() == [pytest.approx([3.0, 0.5]), pytest.approx([1.0, 1.5])]
    # Each slot's mean combine weight: (3/4 + 1/4) / 2.
    assert routing.weight_A.tolist() == pytest.approx([0.5, 0.5])
    assert routing.sample_A.tolist() == [0, 0] and routing.expert_A.tolist() == [0, 1]


@pytest.mark.parametrize(("num_experts", "slots", "tokens"), [(1, 1, 1), (3, 2, 5), (4, 1, 7)])
def test_soft_moe_weights_sum_to_one_over_tokens_and_over_slots(num_experts, slots, tokens):
    router = soft(num_experts, slots, width=6)
    dispatch_BTP, combine_BTP = router.mixing(torch.randn(3, tokens, 6))
    torch.testing.assert_close(dispatch_BTP.sum(dim=1), torch.ones(3, num_experts * slots))
    torch.testing.assert_close(combine_BTP.sum(dim=2), torch.ones(3, tokens))
    routing = router(torch.randn(3, tokens, 6))
    torch.testing.assert_close(routing.weight_A.view(3, -1).sum(dim=1), torch.ones(3))
    torch.testing.assert_close(routing.probs_BE.sum(dim=1), torch.ones(3))


def test_soft_moe_is_the_mean_over_tokens_of_the_papers_output():
    torch.manual_seed(0)
    experts = ExpertsConfig(sizes=[[4], [7], [5]], shared=[[3]])
    moe = MixtureOfExperts(6, 10, RouterConfig(kind="soft_moe", slots=2), experts).eval()
    x_BTD = torch.randn(3, 5, 6)
    dispatch_BTP, combine_BTP = moe.router.mixing(x_BTD)
    slots_BPD = torch.einsum("btp,btd->bpd", dispatch_BTP, x_BTD)
    outputs_BPC = torch.cat([moe.experts[e](slots_BPD[:, 2 * e : 2 * e + 2]) for e in range(3)], dim=1)
    tokens_BTC = torch.einsum("btp,bpc->btc", combine_BTP, outputs_BPC)
    expected = tokens_BTC.mean(dim=1) + moe.shared[0](x_BTD.mean(dim=1))
    logits, routing = moe(x_BTD)
    torch.testing.assert_close(logits, expected)
    assert routing.counts_E.tolist() == [6, 6, 6]


def test_an_excluded_expert_has_no_weight_under_soft_routing():
    routing = soft(3, 2, width=6)(torch.randn(4, 5, 6), allowed_E=torch.tensor([True, False, True]))
    assert torch.all(routing.weight_A[routing.expert_A == 1] == 0)
    torch.testing.assert_close(routing.weight_A.view(4, -1).sum(dim=1), torch.ones(4))
