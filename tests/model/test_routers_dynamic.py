"""Top-p and Sinkhorn routing, by numbers worked out by hand."""

import math

import pytest
import torch

from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import RouterConfig, build_router
from model.routers.sinkhorn import column_scales


def router_of(kind, experts, **options):
    """A router whose logits are its inputs."""
    router = build_router(RouterConfig(kind=kind, norm="none", **options), experts, experts)
    router.gate.weight.data, router.gate.bias.data = torch.eye(experts), torch.zeros(experts)
    return router


def chosen(routing):
    """Each sample's experts and weights, as lists of pairs."""
    found = [[] for _ in range(routing.num_samples)]
    for b, e, w in zip(routing.sample_A.tolist(), routing.expert_A.tolist(), routing.weight_A.tolist(), strict=True):
        found[b].append((e, pytest.approx(w, abs=1e-6)))
    return found


@pytest.mark.parametrize("training", [True, False])
def test_top_p_takes_experts_until_their_probability_reaches_p(training):
    # 0.6 alone reaches 0.5; 0.4 + 0.35 do; of four equal ones two do, which reach it exactly; so do all under p = 1.
    gates_BE = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.4, 0.05, 0.35, 0.2], [0.25] * 4])
    router = router_of("top_p", 4, p=0.5).train(training)
    assert chosen(router(gates_BE.log())) == [[(1, 0.6)], [(0, 0.4), (2, 0.35)], [(0, 0.25), (1, 0.25)]]
    everything = router_of("top_p", 4, p=1.0).train(training)(gates_BE[1:2].log())
    assert chosen(everything) == [[(0, 0.4), (2, 0.35), (3, 0.2), (1, 0.05)]]


def test_top_p_gives_more_experts_to_samples_with_an_uncertain_gate():
    direction_E = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0])
    logits_BE = direction_E * torch.tensor([[0.0], [0.3], [1.0], [4.0]])
    counts = [len(row) for row in chosen(router_of("top_p", 6, p=0.9).eval()(logits_BE))]
    assert counts == [6, 5, 3, 1]


def test_top_p_tracks_the_mean_number_of_experts():
    router = router_of("top_p", 4, p=0.5, top_k=2).train()
    assert router.experts_per_sample == 2.0
    router(torch.tensor([[9.0, 0.0, 0.0, 0.0]] * 3 + [[0.0] * 4]))  # 1, 1, 1 and 2 experts
    assert router.experts_per_sample == pytest.approx(2 + 0.1 * (1.25 - 2))
    assert "mean_experts" in router.state_dict()
    before = router.experts_per_sample
    router.eval()(torch.randn(5, 4))
    router.train()(torch.randn(5, 4), warmup=True)
    assert router.experts_per_sample == before


def test_sinkhorn_scales_the_columns_to_their_target():
    # exp(logits) = [[4, 1], [1, 1]]. Scaled to halves, [[a, b], [b, a]] / 2 with a + b = 1 and the cross ratio
    # (a / b)^2 = 4: a = 2/3. The columns' scales are as 1 : 2.
    scale_E = column_scales(torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log(), torch.tensor([0.5, 0.5]), 100)
    assert (scale_E[1] - scale_E[0]).item() == pytest.approx(math.log(2), abs=1e-5)
    torch.manual_seed(0)
    logits_BE, target_E = torch.randn(50, 4) + torch.tensor([3.0, 0.0, 0.0, -2.0]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    plan_BE = (logits_BE + column_scales(logits_BE, target_E, 50)).softmax(dim=1) / 50
    torch.testing.assert_close(plan_BE.sum(dim=0), target_E, atol=1e-5, rtol=1e-4)


def test_sinkhorn_balances_the_loads_in_training_and_uses_plain_top_k_in_evaluation():
    torch.manual_seed(0)
    logits_BE = torch.randn(600, 6) + torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0, -2.0])
    for top_k in (1, 2):
        router = router_of("sinkhorn", 6, top_k=top_k)
        trained, evaluated = router.train()(logits_BE), router.eval()(logits_BE)
        assert trained.counts_E.max() < 1.5 * 100 * top_k and trained.counts_E.min() > 0.5 * 100 * top_k
        assert evaluated.counts_E.max() > 2.5 * 100 * top_k / top_k
        best_BK = logits_BE.topk(top_k, dim=1).indices
        assert torch.equal(evaluated.expert_A.view(600, top_k), best_BK)


def test_sinkhorn_reaches_the_target_load():
    torch.manual_seed(0)
    options = {"top_k": 1, "target_load": [1.0, 2.0, 3.0], "sinkhorn_iterations": 64}
    router = router_of("sinkhorn", 3, **options).train()
    # The plan has these loads exactly, its largest entries nearly where the gate is sure.
    share_E = router(10 * torch.randn(3000, 3) + torch.tensor([8.0, 0.0, 0.0])).counts_E / 3000
    assert share_E.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=0.04)


def test_the_weights_of_sinkhorn_are_those_of_the_gate():
    logits_BE = torch.tensor([[2.0, 0.0, -1.0], [1.0, 0.5, 0.0]])
    one = router_of("sinkhorn", 3, top_k=1).eval()(logits_BE)
    assert one.weight_A.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))])
    two = router_of("sinkhorn", 3, top_k=2).eval()(logits_BE)
    total = math.exp(2) + 1 + math.exp(-1)
    assert two.weight_A[:2].tolist() == pytest.approx([math.exp(2) / total, 1 / total])
    trained = router_of("sinkhorn", 3, top_k=2).train()(logits_BE)
    gates_BE = logits_BE.softmax(dim=1)
    torch.testing.assert_close(trained.weight_A, gates_BE[trained.sample_A, trained.expert_A])


def test_a_batch_with_fewer_choices_than_experts_is_routed_by_its_logits():
    router = router_of("sinkhorn", 4, top_k=1).train()
    x_BE = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    assert router(x_BE).expert_A.tolist() == [2]
    assert router(x_BE.repeat(4, 1)).num_samples == 4  # equal samples: any expert, and no error


def test_both_train_through_a_mixture():
    torch.manual_seed(0)
    for kind, top_k in (("top_p", 2), ("sinkhorn", 1), ("sinkhorn", 2)):
        moe = MixtureOfExperts(5, 3, RouterConfig(kind=kind, top_k=top_k), ExpertsConfig(sizes=[[4], [8], [6]]))
        logits_BC, _ = moe.train()(torch.randn(40, 5))
        torch.nn.functional.cross_entropy(logits_BC, torch.randint(3, (40,))).backward()
        assert moe.router.gate.weight.grad.abs().sum() > 0
