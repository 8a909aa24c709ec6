"""Necks and the layers after them, against numbers worked out by hand."""

import math

import pytest
import torch

from model.balance import BalanceConfig, balance_losses
from model.classifier import NECKS, NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig, build_router

TOKENS = torch.tensor([[[1.0, 3.0], [2.0, 8.0]]])  # each pair is -1 and 1 when it is normalised


def classifier(neck, shape, sizes=([],), **experts):
    router = RouterConfig(kind="noisy_topk", top_k=1, norm="none")
    return VisionMoE(shape, 3, neck, router, ExpertsConfig(sizes=list(sizes), **experts))


def test_flatten_neck_by_hand():
    neck = NECKS["flatten"]((2, 2), NeckConfig(kind="flatten"))
    assert neck(TOKENS).tolist() == [pytest.approx([-1, 1, -1, 1], abs=1e-4)]
    with torch.no_grad():
        neck.norm.weight.copy_(torch.tensor([2.0, 3.0]))
        neck.norm.bias.copy_(torch.tensor([0.0, 1.0]))
    assert neck(TOKENS).tolist() == [pytest.approx([-2, 4, -2, 4], abs=1e-4)]


def test_tokens_neck_by_hand():
    neck = NECKS["tokens"]((2, 2), NeckConfig(kind="tokens"))
    assert neck(TOKENS).tolist() == [[pytest.approx([-1, 1], abs=1e-4)] * 2]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("layer", [[-1, 1], [-1, 1]]), ("batch", [[-1, -1], [1, 1]]), ("none", [[1, 3], [2, 8]])],
)
def test_pooled_neck_by_hand(norm, expected):
    neck = NECKS["pooled"]((2,), NeckConfig(norm=norm)).train()
    found = neck(TOKENS[0]).tolist()
    assert [pytest.approx(row, abs=1e-4) for row in expected] == found


def test_attention_neck_by_hand():
    neck = NECKS["attention"]((2, 4), NeckConfig(kind="attention", heads=2))
    # Queries and keys are s times the normalised token, values the token itself, with 4 s^2 / sqrt(2) = log 3.
    scale = math.sqrt(math.log(3) * math.sqrt(2) / 4)
    with torch.no_grad():
        identity = torch.eye(4)
        neck.attention.in_proj_weight.copy_(torch.cat([scale * identity, scale * identity, identity]))
        neck.attention.in_proj_bias.zero_()
        neck.attention.out_proj.weight.copy_(identity)
        neck.attention.out_proj.bias.zero_()
    # Twice (1, -1, 1, -1) and (-1, 1, 1, -1), which the first norm gives back, and 5.
    tokens_BTD = torch.tensor([[[7.0, 3.0, 7.0, 3.0], [3.0, 7.0, 7.0, 3.0]]])
    # The first head sees products of 2 and -2: weights 3/4 and 1/4, so (1/2, -1/2) and (-1/2, 1/2). To the second the
    # tokens are alike: (1, -1). Residuals (7.5, 2.5, 8, 2) and (2.5, 7.5, 8, 2), of mean 5 and variance 7.625.
    deviation = math.sqrt(7.625)
    expected = [2.5, -2.5, 3, -3, -2.5, 2.5, 3, -3]
    assert neck(tokens_BTD)[0].tolist() == pytest.approx([value / deviation for value in expected], abs=1e-4)


@pytest.mark.parametrize("kind", ["pooled", "flatten"])
def test_dropout_of_the_neck_applies_to_the_input_of_gate_and_experts(kind):
    torch.manual_seed(0)
    shape = (400,) if kind == "pooled" else (4, 100)
    model = classifier(NeckConfig(kind=kind, dropout=0.5), shape, dispatch="sorted").train()
    read = []
    for module in (model.moe.router, model.moe.experts[0]):
        module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten()))
    features = torch.randn(1, *shape)
    whole = model.neck(features).flatten()
    model(features)
    for seen in read:
        assert 0.4 < (seen == 0).float().mean() < 0.6
        torch.testing.assert_close(seen[seen != 0], 2 * whole[seen != 0])
    assert torch.equal(read[0] == 0, read[1] == 0)
    model.eval()(features)
    assert torch.equal(read[-1], whole)


def test_a_hidden_layer_of_the_gate_has_a_relu_and_dropout_in_training():
    torch.manual_seed(0)
    config = RouterConfig(kind="mixtral", top_k=2, norm="none", hidden=[2], dropout=0.25)
    router = build_router(config, 2, 2)
    with torch.no_grad():
        for layer in (router.trunk[0], router.gate):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    x_BD = torch.tensor([[3.0, -5.0]]).expand(400, 2)
    assert router.eval()(x_BD).logits_BE[0].tolist() == [3.0, 0.0]
    logits_BE = router.train()(x_BD).logits_BE
    assert sorted(set(logits_BE[:, 0].tolist())) == [0.0, 4.0]  # 3 / (1 - 1/4)
    assert (logits_BE[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("kind", ["mixtral", "hierarchical", "expert_choice"])
def test_the_z_loss_reads_the_logits_and_not_the_gate_at_its_temperature(kind):
    config = RouterConfig(kind=kind, top_k=2, norm="none", temperature=2.0)
    router = build_router(config, 4, 2 if kind != "hierarchical" else 4)
    logits = [math.log(3), 0.0]
    with torch.no_grad():  # of two experts, or of two groups of two alike
        router.gate.weight.zero_()
        router.gate.bias.copy_(torch.tensor(logits if kind != "hierarchical" else [*logits, 0, 0, 0, 0]))
    losses = balance_losses(router.train()(torch.randn(5, 4)), BalanceConfig(switch=0.0, z_loss=1.0))
    assert losses["z_loss"].item() == pytest.approx(math.log(4) ** 2)


@pytest.mark.parametrize("kind", ["pooled", "tokens"])
def test_shared_experts_train_the_neck(kind):
    shape = (5,) if kind == "pooled" else (2, 5)
    router = RouterConfig(kind="mixtral" if kind == "pooled" else "soft_moe", top_k=2, norm="none")
    experts = ExpertsConfig(sizes=[[], []], shared=[[], []])
    model = VisionMoE(shape, 3, NeckConfig(kind=kind), router, experts).train()
    with torch.no_grad():  # the routed experts output zero, and give neither neck nor gate a gradient
        for expert in model.moe.experts:
            expert[0].weight.zero_()
    logits_BC, _ = model(torch.randn(7, *shape))
    logits_BC.sum().backward()
    # Each logit is a product with the neck's output, and so with its bias: of 7 samples the sum of all weights.
    expected_D = 7 * sum(expert[0].weight.sum(dim=0) for expert in model.moe.shared)
    torch.testing.assert_close(model.neck.norm.bias.grad, expected_D)


def test_each_feature_is_normalised_separately():
    neck = NECKS["pooled"]((4,), NeckConfig(norm="each"), 2)
    features_BF = torch.tensor([[1.0, 3.0, 100.0, 500.0]])  # deviations of 1 and 200 from the means 2 and 300
    torch.testing.assert_close(neck(features_BF), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), atol=1e-4, rtol=0)
    assert not list(neck.parameters())
