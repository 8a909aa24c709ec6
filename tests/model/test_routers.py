"""The two noisy gates, and what all routers share: weights, noise, warm-up, the load estimate, normalisation."""

import math

import pytest
import torch
from routing_helpers import identity_router

from model.routers import RouterConfig, build_router
from model.routers.noise import load_probability

KINDS = ["article", "noisy_topk"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_softmax_of_the_kept_logits(kind):
    routing = identity_router(kind, 4, 2)(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    # The two largest are 3 and 2: e^3 / (e^3 + e^2) = 1 / (1 + e^-1) = 0.731059 and 0.268941.
    assert routing.expert_A.tolist() == [1, 2]
    assert routing.sample_A.tolist() == [0, 0]
    assert routing.weight_A.tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_divides_the_logits(kind):
    routing = identity_router(kind, 4, 2, temperature=2.0)(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    # 1 / (1 + e^-0.5) = 0.622459.
    assert routing.weight_A[0].item() == pytest.approx(0.622459, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_per_sample_keeps_the_probability_so_that_the_gate_learns(kind):
    router = identity_router(kind, 3, 1).train()
    routing = router(torch.tensor([[0.0, math.log(2.0), 0.0]]))
    routing.weight_A.sum().backward()
    assert 0 < routing.weight_A.item() < 1
    assert router.gate.weight.grad.abs().sum() > 0
    # Without noise: 2 / (1 + 2 + 1) = 0.5.
    assert router.eval()(torch.tensor([[0.0, math.log(2.0), 0.0]])).weight_A.item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_and_a_single_expert(kind):
    routing = identity_router(kind, 3, 3)(torch.randn(5, 3))
    assert routing.weight_A.view(5, 3).sum(dim=1).tolist() == pytest.approx([1.0] * 5)
    assert sorted(routing.expert_A[:3].tolist()) == [0, 1, 2]
    single = identity_router(kind, 1, 1).train()(torch.randn(4, 1))
    assert single.expert_A.tolist() == [0] * 4
    assert single.weight_A.tolist() == [1.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_in_training_only(kind):
    router = identity_router(kind, 6, 2)
    x = torch.randn(64, 6) * 0.1
    assert torch.equal(router(x).expert_A, router(x).expert_A)
    router.train()
    assert not torch.equal(router(x).expert_A, router(x).expert_A)


def test_article_noise_grows_with_the_spread_of_the_samples_logits():
    router = identity_router("article", 2, 1, noise_std=0.5, dropout=0.0).train()
    torch.manual_seed(0)
    for scale in (1.0, 100.0):
        # Logits (s, 0): spread s / sqrt 2, noise of each 0.5 s / sqrt 2, so that their difference is
        # s + 0.5 s N(0, 1), and the smaller one is chosen with probability Phi(-2) = 0.0228 at any scale.
        logits = torch.tensor([[scale, 0.0]]).expand(200_000, 2)
        share = router(logits).expert_A.float().mean().item()
        assert share == pytest.approx(0.0228, abs=0.002)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_warm_up_draws_distinct_experts_uniformly_with_equal_weights(kind, top_k):
    router = identity_router(kind, 4, top_k).train()
    torch.manual_seed(0)
    routing = router(torch.randn(4000, 4) * 50, warmup=True)
    chosen = routing.expert_A.view(4000, top_k)
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    assert torch.all(routing.weight_A == 1 / top_k)
    assert not routing.learned
    share_E = routing.counts_E / routing.counts_E.sum()
    assert share_E.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_counts_and_importance():
    routing = identity_router("article", 3, 2)(torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]]))
    assert routing.counts_E.tolist() == [2, 1, 1]
    # Both samples weight (2, 1) as 0.731059, 0.268941.
    assert routing.importance_E.tolist() == pytest.approx([1.462117, 0.268941, 0.268941], abs=1e-6)


def test_load_probability_by_hand():
    clean = torch.tensor([[1.0, 0.0, -1.0]])
    noisy = torch.tensor([[0.5, 0.7, -1.0]])
    sigma = torch.tensor([[1.0, 0.5, 2.0]])
    # k = 1. Noisy order: 0.7 (expert 1, kept), 0.5, -1. Expert 1 must stay above 0.5, the others must pass 0.7:
    # Phi((1 - 0.7) / 1) = Phi(0.3) = 0.617911; Phi((0 - 0.5) / 0.5) = Phi(-1) = 0.158655;
    # Phi((-1 - 0.7) / 2) = Phi(-0.85) = 0.197663.
    found = load_probability(clean, noisy, sigma, top_k=1)[0].tolist()
    assert found == pytest.approx([0.617911, 0.158655, 0.197663], abs=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 1), (4, 2), (8, 3), (5, 5)])
def test_load_probability_sums_to_k_in_expectation(num_experts, top_k):
    generator = torch.Generator().manual_seed(num_experts * 10 + top_k)
    clean = torch.randn(1, num_experts, generator=generator).expand(100_000, num_experts)
    sigma = (torch.rand(1, num_experts, generator=generator) + 0.5).expand_as(clean)
    noisy = clean + torch.randn(clean.shape, generator=generator) * sigma
    total = load_probability(clean, noisy, sigma, top_k).sum(dim=-1).mean().item()
    assert total == pytest.approx(top_k, abs=0.01)


def test_load_probability_is_the_probability_of_being_chosen():
    router = build_router(RouterConfig(top_k=2, norm="none"), 4, 4).train()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
        router.noise.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    x = torch.tensor([[0.5, 0.2, -0.3, 0.0]]).expand(100_000, 4)
    routing = router(x)
    chosen_E = routing.counts_E / 100_000
    assert routing.gate.load_BE.mean(dim=0).tolist() == pytest.approx(chosen_E.tolist(), abs=0.01)


def test_gate_stays_float32_under_autocast():
    router = identity_router("noisy_topk", 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(torch.randn(3, 4).bfloat16())
    assert routing.logits_BE.dtype == torch.float32
    assert routing.weight_A.dtype == torch.float32


def test_hidden_layers_make_the_gate_an_mlp():
    router = build_router(RouterConfig(kind="article", norm="none", hidden=[8, 6], dropout=0.2), 5, 4)
    shapes = [tuple(p.shape) for name, p in router.named_parameters() if name.endswith("weight")]
    assert shapes == [(8, 5), (6, 8), (4, 6)]


def test_batch_norm_removes_the_component_shared_by_all_samples():
    torch.manual_seed(0)
    x = torch.randn(512, 6) * 0.1 + 50 * torch.randn(6)  # the common part is far larger than the differences
    shares = {}
    for norm in ("none", "batch"):
        router = build_router(RouterConfig(kind="article", top_k=1, norm=norm), 6, 4).train()
        for _ in range(200):
            router(x)
        shares[norm] = (router.eval()(x).counts_E / 512).max().item()
    assert shares["none"] == 1.0
    assert shares["batch"] < 0.9


def test_a_training_batch_of_one_sample():
    router = build_router(RouterConfig(norm="batch"), 6, 4).train()
    assert router(torch.randn(1, 6)).expert_A.shape == (2,)


def test_normalising_with_running_statistics_does_not_depend_on_the_batch():
    from model.norm import Standardise

    torch.manual_seed(0)
    norm = Standardise(3, affine=False, by_running=True).train()
    x = torch.randn(64, 3) * 2 + 5
    for _ in range(200):
        norm(x)
    together, alone = norm(x), torch.cat([norm(row) for row in x.split(1)])
    torch.testing.assert_close(together, alone)
    assert together.mean(dim=0).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("even", [1 / 3] * 3),
        ("size", [1 / 7, 2 / 7, 4 / 7]),
        ("inverse_size", [4 / 7, 2 / 7, 1 / 7]),  # 1 : 1/2 : 1/4
        ([3.0, 2.0, 5.0], [0.3, 0.2, 0.5]),
    ],
)
def test_target_shares(target, expected):
    router = build_router(RouterConfig(target_load=target), 4, 3, work=[10.0, 20.0, 40.0])
    assert router.target_E.tolist() == pytest.approx(expected)
    assert router.work_E.tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    assert router(torch.randn(2, 4)).gate.target_E.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5}, "top_k 5 is larger than the number of experts 4"),
        ({"kind": "switch"}, "set router.top_k 1, not 2"),
        ({"kind": "gshard", "top_k": 1}, "set router.top_k 2, not 1"),
        ({"kind": "mixtral", "top_k": 1}, "the gate no gradient"),
        ({"kind": "hierarchical", "groups": 3}, "router.groups 3 does not divide the 4 experts"),
        ({"kind": "hierarchical", "top_groups": 3}, "router.top_groups 3 is larger than router.groups 2"),
        ({"kind": "hierarchical", "top_k": 3, "top_groups": 2}, "cannot be divided among"),
        ({"kind": "hierarchical", "top_k": 4}, "cannot be divided among router.top_groups 1 groups of 2 experts"),
        ({"kind": "hierarchical", "capacity_factor": 1.0, "overflow": "next_best"}, "does not support"),
        ({"kind": "expert_choice", "capacity_factor": 5.0}, "there are only 4: lower it"),
        ({"kind": "expert_choice", "bias_rate": 0.1}, "router.bias_rate is for rules that choose k experts"),
        ({"kind": "expert_choice", "capacity_factor": 1.0, "overflow": "residual"}, "set router.overflow drop"),
        ({"kind": "soft_moe", "capacity_factor": 1.0}, "soft_moe drops nothing"),
        ({"kind": "soft_moe", "hidden": [4]}, "soft_moe has no gate network"),
        ({"kind": "hash", "hidden": [4]}, "hash has no gate network"),
        ({"target_load": [1.0, 2.0]}, "router.target_load names 2 shares, but there are 4 experts"),
        ({"target_load": [1.0, 2.0, 0.0, 1.0]}, "every share must be finite and above 0"),
        ({"capacity_factor": 0.0}, "router.capacity_factor is 0.0"),
        ({"capacity_factor": -1.0}, "router.capacity_factor is -1.0"),
        ({"capacity_factor": math.nan}, "router.capacity_factor is nan"),
        ({"overflow": "next_best"}, "has no effect without router.capacity_factor"),
        ({"jitter": 1.0}, "router.jitter is 1.0"),
        ({"noise_std": -1.0}, "router.noise_std is -1.0"),
        ({"bias_rate": math.inf}, "router.bias_rate is inf"),
        ({"noise_std": 1e300}, "router.noise_std is 1e+300: it must be 0, or from 1e-06 to 1e+06"),
        ({"noise_std": 1e-300}, "router.noise_std is 1e-300"),
        ({"temperature": 1e-300}, "router.temperature is 1e-300: it must be from 1e-06"),
        ({"temperature": 1e300}, "router.temperature is 1e+300"),
        ({"target_load": [1e-9, 1.0, 1.0, 1.0]}, "every share must be at least 1e-06 of their sum"),
        ({"slots": 0}, "router.slots is 0"),
        ({"inputs": []}, "router.inputs is []"),
        ({"inputs": [1, 1]}, "each once"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError) as caught:
        build_router(RouterConfig(**options), 6, 4)
    assert words in str(caught.value)
