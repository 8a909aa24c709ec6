"""An expert without samples in a step: every dispatch mode and every optimizer give the same weights."""

import pytest
import torch
from conftest import mostly_slow
from routing_helpers import listed_routing

from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.dispatch import DISPATCHERS, dispatch
from model.experts import ExpertsConfig, build_experts
from model.routers import RouterConfig
from model.routing import Assignments
from training.graph import GraphedStep
from training.optim import OptimConfig, build_optimizer
from training.step import TrainingStep

SHAPES = {"equal": [[8]] * 6, "unequal": [[8], [16, 8], [], [8], [24], [16, 8]]}


def trained(how, kind, sizes, combine, device="cpu", steps=20):
    """Weights after steps of 4 samples with random loads of 6 experts, and the total number of loads that were 0."""
    torch.manual_seed(0)
    # The choice is a fixed function of the sample, so the modes' different rounding changes no load.
    router = RouterConfig(kind="hash", top_k=2)
    dispatched = "auto" if how == "captured" else how
    experts = ExpertsConfig(sizes=sizes, shared=[[4]], dropout=0.0, dispatch=dispatched, combine=combine)
    model = VisionMoE((8,), 3, NeckConfig(), router, experts).to(device).train()
    optimizer = build_optimizer(model, OptimConfig(kind=kind, weight_decay=0.5, lr=1e-2))
    step = TrainingStep(model, optimizer, BalanceConfig(switch=0.0), 0.0, 1.0, "float32")
    if how == "captured":
        step = GraphedStep(step, batch_size=4)
    generator, empty = torch.Generator().manual_seed(1), 0
    for _ in range(steps):
        x_BD, labels_B = torch.randn(4, 8, generator=generator), torch.randint(3, (4,), generator=generator)
        before_E = model.moe.usage_E.clone()
        step(x_BD.to(device), labels_B.to(device), warmup=False)
        empty += int((model.moe.usage_E == before_E).sum())
    return list(model.state_dict().values()), empty


@pytest.mark.parametrize("sizes", mostly_slow(SHAPES, ["unequal"]))
@pytest.mark.parametrize(("kind", "combine"), [("adamw", "logits"), ("adam", "probabilities")])
def test_every_mode_gives_the_same_weights_for_any_load(sizes, kind, combine):
    expected, empty = trained("sorted", kind, SHAPES[sizes], combine)
    assert empty > 20
    for how in ("grouped", "dense", "auto"):
        for value, reference in zip(trained(how, kind, SHAPES[sizes], combine)[0], expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", sorted(DISPATCHERS))
@pytest.mark.parametrize("assigned", [[0, 2, 2], []])
def test_an_expert_without_samples_has_a_gradient_of_zero(how, assigned):
    torch.manual_seed(0)
    moe = VisionMoE((8,), 3, NeckConfig(), RouterConfig(), ExpertsConfig(sizes=[[8], [16], [8]])).moe
    expert_A = torch.tensor(assigned, dtype=torch.int64)
    routing = listed_routing(torch.arange(len(assigned)), expert_A, torch.ones(len(assigned)), torch.zeros(4, 3))
    outputs_AC, _ = dispatch(torch.randn(4, 8), routing.assignments, moe.experts, how)
    assert outputs_AC.shape == (len(assigned), 3)
    outputs_AC.sum().backward()
    for index, expert in enumerate(moe.experts):
        gradients = torch.cat([parameter.grad.flatten() for parameter in expert.parameters()])
        assert (gradients.abs().sum() > 0) == (index in assigned)


@pytest.mark.parametrize("how", sorted(DISPATCHERS))
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_an_expert_that_is_never_chosen_is_trained_with_a_zero_gradient(how, kind):
    torch.manual_seed(0)
    router = RouterConfig(kind="mixtral", top_k=2, norm="none")
    experts = ExpertsConfig(sizes=[[8]] * 4, dropout=0.0)
    model = VisionMoE((8,), 3, NeckConfig(), router, experts).train()
    model.moe.dispatch_mode = how
    with torch.no_grad():
        model.moe.router.gate.bias[3] = -50.0
    alone = torch.nn.Linear(8, 8)
    alone.load_state_dict(model.moe.experts[3][0].state_dict())
    config = OptimConfig(kind=kind, weight_decay=0.5, lr=1e-2)
    step = TrainingStep(model, build_optimizer(model, config), BalanceConfig(), 0.0, 1.0, "float32")
    optimizer = build_optimizer(alone, config)
    for _ in range(5):
        step(torch.randn(16, 8), torch.randint(3, (16,)), warmup=False)
        for parameter in alone.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(model.moe.experts[3][0].weight, alone.weight)
    if kind == "adamw":  # 5 steps of 1 - lr * weight decay
        norm = (alone.weight / (1 - 0.005) ** 5).norm()
        torch.manual_seed(0)
        first = VisionMoE((8,), 3, NeckConfig(), router, experts).moe.experts[3][0].weight
        assert norm.item() == pytest.approx(first.norm().item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_on_a_gpu_every_mode_gives_the_same_weights(kind):
    for sizes in SHAPES.values():
        expected, empty = trained("sorted", kind, sizes, "logits", device="cuda")
        assert empty > 20
        for how in ("grouped", "dense", "captured"):
            for value, reference in zip(trained(how, kind, sizes, "logits", device="cuda")[0], expected, strict=True):
                torch.testing.assert_close(value, reference, atol=1e-3, rtol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sizes", [[[16]] * 4, [[16], [32], [16], [32]]], ids=["equal", "unequal"])
def test_on_a_gpu_in_bfloat16_the_gradient_of_an_expert_without_samples_is_zero(sizes):
    experts = build_experts(ExpertsConfig(sizes=sizes, dropout=0.0), 16, 8)[0].cuda()
    x_BD = torch.randn(6, 16, device="cuda")
    for assigned in ([0, 0, 2, 2, 2, 0], [3] * 6):
        expert_A = torch.tensor(assigned, device="cuda")
        indices_A, ones_A = torch.arange(6, device="cuda"), torch.ones(6, device="cuda")
        assignments = Assignments.listed(indices_A, expert_A, ones_A, (6, 4), top_k=1)
        for how in DISPATCHERS:
            experts.zero_grad()
            torch.full((1 << 20,), torch.nan, device="cuda")  # possible content of uninitialised memory
            with torch.autocast("cuda", torch.bfloat16):
                dispatch(x_BD, assignments, experts, how)[0].sum().backward()
            for index, expert in enumerate(experts):
                gradient = torch.cat([parameter.grad.flatten() for parameter in expert.parameters()])
                assert (gradient.abs().sum() > 0) == (index in assigned), (how, index)
