"""The rules in which each sample chooses k of all experts, against numbers worked out by hand."""

from dataclasses import fields

import pytest
import torch
from routing_helpers import identity_router, listed_routing

from model.losses.importance import importance_loss
from model.routers import ROUTERS, RouterConfig, build_router


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
    assert routing.gate.load_BE.mean(dim=0).tolist() == pytest.approx([0.76025, 0.23975], abs=0.005)


def test_vmoe_importance_is_that_of_the_clean_gates_over_all_experts():
    router = identity_router("vmoe", 4, 1).train()
    routing = router(ONE_SAMPLE.expand(3, 4))
    assert routing.gate.importance_BE.sum(dim=0).tolist() == pytest.approx([0.3, 1.2, 0.9, 0.6], abs=1e-6)
    # Over the mean 3/4 they are 0.4, 1.6, 1.2, 0.8: mean square deviation from 1 (0.36 + 0.36 + 0.04 + 0.04) / 4 = 0.2.
    assert importance_loss(routing).item() == pytest.approx(0.2, abs=1e-6)


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
    router.after_step(listed_routing(torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.ones(4), torch.zeros(4, 2)))
    assert router.bias_E.tolist() == pytest.approx([0.01, -0.01])


@pytest.mark.parametrize(("target", "expected"), [("even", [0.5, 0.5]), ([3.0, 1.0], [0.75, 0.25])])
def test_the_bias_alone_brings_an_unbalanced_gate_to_its_target(target, expected):
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


def test_the_gate_reads_its_configured_features():
    router = build_router(RouterConfig(inputs=[2, 0], norm="none", kind="mixtral"), 6, 4, num_groups=3)
    x = torch.randn(5, 6)
    expected = router.gate(torch.cat([x[:, 4:6], x[:, 0:2]], dim=1))
    assert torch.equal(router(x).logits_BE, expected)
    with pytest.raises(ValueError, match="inputs \\[3\\] are not among the 3 feature groups"):
        build_router(RouterConfig(inputs=[3]), 6, 4, num_groups=3)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_kind_is_explained(kind):
    explained = {option.name: option.metadata.get("help", "") for option in fields(RouterConfig)}
    assert f"{kind}: " in explained["kind"] and len(ROUTERS[kind].summary.split()) >= 4
    assert all(len(explained[option].split()) >= 6 for option in ROUTERS[kind].options)
    assert len(ROUTERS[kind].__doc__.split()) > 12


@pytest.mark.parametrize("kind", ["noisy_topk", "hierarchical"])
def test_the_learned_noise_starts_equal_has_a_separate_layer_and_does_not_learn_in_warm_up(kind):
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind=kind, top_k=2, norm="none"), 6, 4).train()
    assert not any(parameter.any() for parameter in (*router.gate.parameters(), *router.noise.parameters()))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    x_BD = torch.randn(5, 6)
    clean, sigma = router._logits(x_BD, noisy=True)
    torch.testing.assert_close(sigma, torch.nn.functional.softplus(router.noise(x_BD)) + 1e-6)
    torch.testing.assert_close(clean, router._logits(x_BD, noisy=False)[0])
    router(x_BD, warmup=True).logits_BE.square().sum().backward()
    assert router.gate.weight.grad is not None and router.noise.weight.grad is None


def test_the_learned_noise_never_vanishes():
    router = identity_router("noisy_topk", 4, 2).train()
    with torch.no_grad():
        router.noise.weight.fill_(-1e4)  # softplus: 0
    assert router._logits(torch.ones(1, 4), noisy=True)[1].tolist() == [pytest.approx([1e-6] * 4)]
