"""Each routing rule against numbers worked out by hand."""

import math

import pytest
import torch

from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import ROUTERS, RouterConfig, Routing, build_router


def identity_router(kind, num_experts, top_k, **options):
    """A router in evaluation mode whose clean logits equal its input: the gate is the identity."""
    router = build_router(RouterConfig(kind=kind, top_k=top_k, norm="none", **options), num_experts, num_experts)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(num_experts))
        router.gate.bias.zero_()
    return router.eval()


def logs(*rows):
    """Logits whose exponentials are in proportion to the rows."""
    return torch.tensor(rows).log()


# Gates in proportion to 1 : 4 : 3 : 2, that is 0.1, 0.4, 0.3, 0.2.
ONE_SAMPLE = logs([1.0, 4.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("kind", "top_k", "options", "experts", "weights"),
    [
        ("vmoe", 2, {}, [1, 2], [0.4, 0.3]),  # not renormalised
        ("switch", 1, {}, [1], [0.4]),
        ("gshard", 2, {}, [1, 2], [4 / 7, 3 / 7]),
        ("mixtral", 2, {}, [1, 2], [4 / 7, 3 / 7]),
        ("mixtral", 3, {}, [1, 2, 3], [4 / 9, 3 / 9, 2 / 9]),
        ("deepseek", 2, {"scores": "softmax"}, [1, 2], [0.4, 0.3]),
        # sigmoid(log 4) = 4/5, sigmoid(log 3) = 3/4; over their sum 31/20: 16/31, 15/31.
        ("deepseek", 2, {}, [1, 2], [16 / 31, 15 / 31]),
        ("deepseek", 1, {}, [1], [0.8]),
        # Temperature 1/2 squares the proportions: 1 : 16 : 9 : 4, their sum 30.
        ("vmoe", 2, {"temperature": 0.5}, [1, 2], [16 / 30, 9 / 30]),
        # sigmoid(2 log 4) = 16/17.
        ("deepseek", 1, {"temperature": 0.5}, [1], [16 / 17]),
    ],
)
def test_weights_by_hand(kind, top_k, options, experts, weights):
    routing = identity_router(kind, 4, top_k, **options)(ONE_SAMPLE)
    assert routing.expert_A.tolist() == experts
    assert routing.weight_A.tolist() == pytest.approx(weights, abs=1e-6)


def test_softmax_then_top_k_then_renormalise_is_top_k_then_softmax():
    logits = torch.randn(50, 6)
    mixtral = identity_router("mixtral", 6, 3)(logits)
    vmoe = identity_router("vmoe", 6, 3)(logits)
    kept = vmoe.weight_A.view(50, 3)
    torch.testing.assert_close(mixtral.weight_A.view(50, 3), kept / kept.sum(dim=1, keepdim=True))


def test_vmoe_noise_has_a_standard_deviation_of_one_over_e():
    router = identity_router("vmoe", 2, 1).train()
    torch.manual_seed(0)
    # Two noises of std 1/2: their difference has std sqrt(1/2); the worse expert, 0.5 behind, wins with probability
    # Phi(-0.5 / 0.707107) = Phi(-0.707107) = 0.239750.
    routing = router(torch.tensor([[0.5, 0.0]]).expand(100_000, 2))
    assert routing.expert_A.float().mean().item() == pytest.approx(0.23975, abs=0.005)
    # The same chance is what load_BE estimates, and its sum over experts is k.
    assert routing.load_BE.mean(dim=0).tolist() == pytest.approx([0.76025, 0.23975], abs=0.005)


def test_vmoe_importance_is_that_of_the_clean_gates_over_all_experts():
    router = identity_router("vmoe", 4, 1).train()
    routing = router(ONE_SAMPLE.expand(3, 4))
    assert routing.gates_BE.sum(dim=0).tolist() == pytest.approx([0.3, 1.2, 0.9, 0.6], abs=1e-6)


def test_switch_jitter_multiplies_the_input_within_its_bounds_and_in_training_only():
    router = identity_router("switch", 3, 1, jitter=0.1)
    x = torch.ones(4000, 3) * 2
    assert torch.equal(router(x).logits_BE, x)
    torch.manual_seed(0)
    jittered = router.train()(x).logits_BE
    # Even on [1.8, 2.2]: mean 2, standard deviation 0.4 / sqrt 12 = 0.115470.
    assert 1.8 <= jittered.min() < 1.801 and 2.199 < jittered.max() <= 2.2
    assert jittered.std().item() == pytest.approx(0.11547, abs=0.002)


def test_gshard_uses_the_second_expert_with_twice_its_gate_and_in_training_only():
    router = identity_router("gshard", 3, 2)
    x = logs([4.0, 1.0, 1e-6]).expand(20_000, 3)  # renormalised gates 0.8 and 0.2
    assert router(x).counts_E.tolist() == [20_000, 20_000, 0]
    torch.manual_seed(0)
    routing = router.train()(x)
    assert routing.counts_E[0] == 20_000
    assert routing.counts_E[1].item() / 20_000 == pytest.approx(0.4, abs=0.01)
    # The first keeps its weight whether or not the second runs; a choice that was not made is no drop.
    assert set(routing.weight_A[routing.expert_A == 0].mul(1e5).round().tolist()) == {80_000}
    assert routing.dropped is None


def test_deepseek_bias_acts_on_the_choice_and_never_on_the_weight():
    router = identity_router("deepseek", 4, 2)
    router.bias_E.copy_(torch.tensor([10.0, 0.0, 0.0, 0.0]))
    routing = router(ONE_SAMPLE)
    # Scores sigmoid(log w) = w / (1 + w): 1/2, 4/5, 3/4, 2/3. The bias makes expert 0 the first choice; its weight
    # stays (1/2) / (1/2 + 4/5) = 5/13.
    assert routing.expert_A.tolist() == [0, 1]
    assert routing.weight_A.tolist() == pytest.approx([5 / 13, 8 / 13], abs=1e-6)


def test_loss_free_bias_moves_by_its_rate_towards_the_target():
    router = identity_router("deepseek", 4, 1, bias_rate=0.01).train()
    x = torch.eye(4)[[0, 0, 0, 0, 1, 1, 2, 0]]
    routing = router(x)
    router.after_step(routing)
    # Demand 5, 2, 1, 0 of 8; even is 2 each: signs -, 0, +, +.
    assert router.bias_E.tolist() == pytest.approx([-0.01, 0.0, 0.01, 0.01])
    router.after_step(router(x, warmup=True))
    assert router.bias_E.tolist() == pytest.approx([-0.01, 0.0, 0.01, 0.01])
    assert not router.bias_E.requires_grad and "bias_E" in router.state_dict()


def test_loss_free_bias_towards_a_given_load():
    router = identity_router("noisy_topk", 2, 1, bias_rate=0.01, target_load=[3.0, 1.0]).train()
    # Target 3/4 and 1/4 of 4 samples: 3 and 1. Demand 2 and 2: up, down.
    router.after_step(Routing(torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.ones(4), torch.zeros(4, 2)))
    assert router.bias_E.tolist() == pytest.approx([0.01, -0.01])


@pytest.mark.parametrize(("target", "expected"), [("even", [0.5, 0.5]), ([3.0, 1.0], [0.75, 0.25])])
def test_the_bias_alone_brings_a_lopsided_gate_to_its_target(target, expected):
    torch.manual_seed(0)
    router = identity_router("deepseek", 2, 1, bias_rate=0.01, target_load=target).train()
    x = torch.randn(512, 2) + torch.tensor([3.0, 0.0])
    for _ in range(200):
        router.after_step(router(x))
    share = router(x).counts_E / 512
    assert share.tolist() == pytest.approx(expected, abs=0.03)


def test_a_moving_average_of_the_weights_averages_the_bias_with_the_gate():
    from timm.utils import ModelEmaV3

    router = identity_router("deepseek", 2, 1)
    ema = ModelEmaV3(router, decay=0.75)
    router.bias_E += 1.0
    ema.update(router)
    assert ema.module.bias_E.tolist() == pytest.approx([0.25, 0.25])


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


def test_hierarchical_load_is_the_chance_to_be_chosen_and_sums_to_k():
    torch.manual_seed(0)
    for top_k, top_groups in ((1, 1), (2, 2), (2, 1)):
        router = hierarchical(top_k, top_groups=top_groups).train()
        with torch.no_grad():
            router.noise.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        routing = router(TWO_LEVELS.expand(50_000, 6) * 0.5)
        assert routing.load_BE.sum(dim=1).mean().item() == pytest.approx(top_k, abs=0.02)
        chosen_E = routing.counts_E / 50_000
        assert routing.load_BE.mean(dim=0).tolist() == pytest.approx(chosen_E.tolist(), abs=0.015)


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


def test_expert_choice_evaluates_each_sample_by_itself():
    router = identity_router("expert_choice", 2, 1)
    router.threshold_E.copy_(torch.tensor([0.75, 0.35]))
    # Gates .9 .1 pass the first; .6 .4 the second, though the first is larger; .7 .3 neither: the larger one then.
    routing = router(logs([9.0, 1.0], [6.0, 4.0], [7.0, 3.0]))
    assert list(zip(routing.sample_A.tolist(), routing.expert_A.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 0)]
    assert routing.weight_A.tolist() == pytest.approx([0.9, 0.4, 0.7], abs=1e-6)


def test_expert_choice_evaluates_about_as_many_experts_a_sample_as_it_trained_with():
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


def test_hash_is_fixed_even_and_without_parameters():
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
    # Training and evaluation agree about a sample, whatever its batch and whether it is in warm-up.
    alone = router.train()(x[:1], warmup=True)
    assert alone.learned and alone.expert_A.tolist() == router.eval()(x[:1]).expert_A.tolist()


def test_hash_weights_are_even():
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
    assert routing.rows_AD.tolist() == [pytest.approx([3.0, 0.5]), pytest.approx([1.0, 1.5])]
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


def test_soft_moe_is_the_mean_over_tokens_of_what_the_paper_computes():
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


def test_a_barred_expert_has_no_weight_under_soft_routing():
    routing = soft(3, 2, width=6)(torch.randn(4, 5, 6), allowed_E=torch.tensor([True, False, True]))
    assert torch.all(routing.weight_A[routing.expert_A == 1] == 0)
    torch.testing.assert_close(routing.weight_A.view(4, -1).sum(dim=1), torch.ones(4))


def test_the_gate_reads_its_own_features():
    router = build_router(RouterConfig(inputs=[2, 0], norm="none", kind="mixtral"), 6, 4, num_groups=3)
    x = torch.randn(5, 6)
    expected = router.gate(torch.cat([x[:, 4:6], x[:, 0:2]], dim=1))
    assert torch.equal(router(x).logits_BE, expected)
    with pytest.raises(ValueError, match="inputs \\[3\\] are not among the 3 feature groups"):
        build_router(RouterConfig(inputs=[3]), 6, 4, num_groups=3)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_kind_is_explained(kind):
    import inspect

    from model.routers import config

    text = inspect.getsource(config.RouterConfig).split('= "noisy_topk"\n')[1].split('"""')[1]
    assert f"{kind}: " in " ".join(text.split())
    assert len(ROUTERS[kind].__doc__.split()) > 12
