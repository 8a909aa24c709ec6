"""Kinds of experts behind the ViT: each by hand, and equal in every dispatch mode."""

import math

import pytest
import torch
from torch import nn

from model.dispatch import DISPATCHERS, dispatch
from model.experts import EXPERTS, ExpertKind, Experts, ExpertsConfig, build_experts
from model.experts.glu import GLUExpert
from model.moe import MixtureOfExperts
from model.routers import RouterConfig

HEADS = sorted(name for name, kind in EXPERTS.items() if kind.place == "head")


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_a_swiglu_expert_by_hand():
    expert = GLUExpert(2, [2], 1, dropout=0.0).eval()
    assert [tuple(layer.weight.shape) for layer in expert.linears] == [(4, 2), (1, 2)]
    expert[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    expert[0].bias.data = torch.tensor([0.0, 0.5, 0.0, -1.0])
    expert[-1].weight.data, expert[-1].bias.data = torch.tensor([[1.0, 10.0]]), torch.tensor([0.25])
    # x = (1, 3): gates 1 and 3.5, values 2 and 3, of mean 2.375 and variance 0.921875 (+ 1e-5).
    gate1, gate2, value1, value2 = ((h - 2.375) / math.sqrt(0.921885) for h in (1.0, 3.5, 2.0, 3.0))
    expected = silu(gate1) * value1 + 10 * silu(gate2) * value2 + 0.25
    assert expert(torch.tensor([[1.0, 3.0]])).item() == pytest.approx(expected)


def test_the_work_of_a_swiglu_expert_is_the_size_of_its_matrices():
    config = ExpertsConfig(kind="glu", sizes=[[4], [5, 3], []])
    experts, _ = build_experts(config, 6, 10)
    assert config.work(6, 10) == [sum(layer.weight.numel() for layer in expert.linears) for expert in experts]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("sizes", [[[8], [8], [16]], [[16, 8]] * 3, [[], [8], []]], ids=str)
def test_all_dispatch_modes_agree(kind, sizes):
    torch.manual_seed(0)
    moe = MixtureOfExperts(8, 5, RouterConfig(kind="mixtral"), ExpertsConfig(kind=kind, sizes=sizes)).double().eval()
    moe.router.float()
    x_BD, found = torch.randn(30, 8, dtype=torch.float64), []
    for moe.dispatch_mode in DISPATCHERS:
        moe.zero_grad()
        logits_BC, _ = moe(x_BD)
        logits_BC.square().sum().backward()
        found.append([logits_BC.detach(), *(parameter.grad for parameter in moe.experts.parameters())])
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


class Cosine(ExpertKind, nn.Module):
    """An expert without layers that could be computed together with others."""

    def __init__(self, in_features, hidden, num_outputs, dropout, columns=None):
        super().__init__()
        self.prototypes_CD = nn.Parameter(torch.randn(num_outputs, in_features))

    def forward(self, x_BD):
        return nn.functional.cosine_similarity(x_BD[:, None], self.prototypes_CD[None].to(x_BD.dtype), dim=-1)


def test_an_expert_of_any_module_works_in_every_dispatch_mode():
    torch.manual_seed(0)
    experts, x_BD = Experts(Cosine(8, [], 5, 0.0) for _ in range(3)), torch.randn(20, 8)
    moe = MixtureOfExperts(8, 5, RouterConfig(kind="mixtral"), ExpertsConfig(sizes=[[8]] * 3))
    routing = moe.router.eval()(x_BD)
    pairs = zip(routing.sample_A, routing.expert_A, strict=True)
    expected_AC = torch.stack([experts[e](x_BD[s, None])[0] for s, e in pairs])
    for way in DISPATCHERS:
        outputs_AC, order_A = dispatch(x_BD, routing.assignments, experts, way)
        torch.testing.assert_close(outputs_AC, expected_AC[order_A])
