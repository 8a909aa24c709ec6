"""Experts: sizes, dropout of each, shared ones, and the features that each reads."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from assembly import start
from config.config import Config
from data.image_set import ImageSet, Splits
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig, build_experts
from model.moe import MixtureOfExperts
from model.routers import RouterConfig


def rates(experts):
    return [[layer.p for layer in expert if isinstance(layer, nn.Dropout)] for expert in experts]


def test_dropout_of_each_expert():
    config = ExpertsConfig(sizes=["small", [8]], shared=[[4]], dropout=[0.1, 0.2, 0.0])
    routed, shared = build_experts(config, 6, 3)
    assert rates(routed) == [[0.1, 0.1], [0.2]] and rates(shared) == [[0.0]]
    routed, shared = build_experts(ExpertsConfig(sizes=["small", [8]], shared=["medium"]), 6, 3)
    assert rates(routed) == [[0.3, 0.3], [0.3]] and rates(shared) == [[0.4, 0.4, 0.4]]
    routed, shared = build_experts(ExpertsConfig(sizes=["small", [8]], shared=["medium"], dropout=0.7), 6, 3)
    assert {rate for expert in rates([*routed, *shared]) for rate in expert} == {0.7}


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_shared_experts_are_always_active_and_their_logits_are_added(combine, top_k):
    if combine == "probabilities" and top_k == 1:
        return  # rejected: the gate would get no gradient
    torch.manual_seed(0)
    experts = ExpertsConfig(sizes=[[4], [5], [6]], shared=[[7], [3]], combine=combine)
    moe = MixtureOfExperts(6, 3, RouterConfig(kind="vmoe", top_k=top_k), experts).eval()
    x = torch.randn(9, 6)
    both, routing = moe(x)
    shared, moe.shared = moe.shared, nn.ModuleList()
    routed, _ = moe(x)
    torch.testing.assert_close(both, routed + shared[0](x) + shared[1](x))
    assert routing.num_experts == 3 and routing.counts_E.sum() == 9 * top_k
    assert (routed - both).abs().max() > 0.01


def test_a_small_routed_correction_learns_beside_a_shared_expert():
    torch.manual_seed(0)
    experts = ExpertsConfig(sizes=[[2], [2]], shared=[[8]], dropout=0.0)
    moe = MixtureOfExperts(6, 3, RouterConfig(kind="switch", top_k=1), experts).train()
    logits, _ = moe(torch.randn(32, 6))
    nn.functional.cross_entropy(logits, torch.randint(3, (32,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
    assert all(module.weight.grad.abs().sum() > 0 for module in (moe.shared[0][0], moe.experts[0][0], moe.router.gate))


def test_each_expert_reads_its_own_features():
    experts = ExpertsConfig(sizes=[[4], [5]], shared=[[3]], inputs=[[0], [2, 1], [0, 1, 2]], dropout=0.0)
    model = VisionMoE((12,), 3, NeckConfig(norm="none"), RouterConfig(top_k=2, inputs=[1]), experts, num_groups=3)
    model.eval()
    assert [expert[0].in_features for expert in (*model.moe.experts, *model.moe.shared)] == [4, 8, 12]
    assert model.moe.router.gate.in_features == 4
    x = torch.randn(2, 12, requires_grad=True)

    def read(output):
        (grad,) = torch.autograd.grad(output.sum(), x)
        return (grad.abs().sum(dim=0) > 0).tolist()

    first, second = (model.moe.experts[e](x) for e in range(2))
    assert read(first) == [True] * 4 + [False] * 8
    assert read(second) == [False] * 4 + [True] * 8
    torch.nn.init.normal_(model.moe.router.gate.weight)
    assert read(model.moe.router(x).logits_BE.select(1, 0)) == [False] * 4 + [True] * 4 + [False] * 4
    # Group 2 comes first for the second expert, as its list says.
    reordered = nn.Sequential(*model.moe.experts[1])(torch.cat([x[:, 8:], x[:, 4:8]], dim=1))
    torch.testing.assert_close(second, reordered)
    assert model(x)[0].shape == (2, 3)


def test_work_is_what_an_expert_multiplies():
    config = ExpertsConfig(sizes=[[4], [5, 3]], inputs=[[0], [0, 1]])
    # 6 features in two groups: 3 * 4 + 4 * 10; 6 * 5 + 5 * 3 + 3 * 10.
    assert config.work(6, 10, num_groups=2) == [52.0, 75.0]
    moe = MixtureOfExperts(6, 10, RouterConfig(target_load="size"), config, num_groups=2)
    assert moe.router.target_E.tolist() == pytest.approx([52 / 127, 75 / 127])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": []}, "experts.sizes is empty"),
        ({"shared": ["giant"]}, "experts.shared has 'giant'"),
        ({"shared": [[0]]}, "experts.shared has [0]"),
        ({"dropout": [0.1]}, "experts.dropout has 1 entries for 4 experts"),
        ({"dropout": [0.1, 0.1, 0.1, 1.0]}, "experts.dropout is 1.0"),
        ({"inputs": [[0], [1]]}, "experts.inputs has 2 entries for 4 experts"),
        ({"inputs": [[0], [1], [], [0]]}, "must read at least one feature"),
        ({"sizes": [[4]], "shared": [[4]], "inputs": [[0]]}, "(1 in experts.sizes, 1 in experts.shared)"),
    ],
)
def test_impossible_experts_are_named(options, words):
    with pytest.raises(ValueError) as caught:
        ExpertsConfig(**options)
    assert words in str(caught.value)


def test_a_missing_feature_is_named():
    experts = ExpertsConfig(sizes=[[4], [4]], inputs=[[0], [3]])
    with pytest.raises(ValueError, match=r"inputs \[3\] are not among the 3 feature groups of 12 features"):
        VisionMoE((12,), 3, NeckConfig(), RouterConfig(), experts, num_groups=3)


def test_shared_experts_are_printed_with_the_routed_ones(monkeypatch, capsys):
    monkeypatch.setattr(start, "cost", lambda *parts: SimpleNamespace(lines=lambda: [], backbone_flops=1))
    monkeypatch.setattr(start, "warn_of_hours", lambda *parts: None)
    images = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    splits = Splits(images, images, images)
    trainer = SimpleNamespace(
        identity={},
        model=SimpleNamespace(mixtures=[SimpleNamespace(router=SimpleNamespace(experts_per_sample=2))]),
        bank=SimpleNamespace(feature_shape=(1,)),
        run=SimpleNamespace(path="run"),
        experts=None,
    )
    for shared, line in (
        ([[2048], "small"], "shared       2048, 256-128; they process every sample"),
        ([], None),
    ):
        config = Config(experts=ExpertsConfig(sizes=[[64], [128]], shared=shared))
        start.announce(config, SimpleNamespace(splits=splits, backbone=None), trainer)
        printed = capsys.readouterr().out
        assert "experts      0 · 64, 1 · 128; 2 per sample by noisy_topk" in printed
        assert (line in printed) if line else ("shared" not in printed)
