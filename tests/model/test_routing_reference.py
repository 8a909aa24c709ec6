"""Every rule, with its options together, against a reference that goes sample by sample in float64.

Rule x temperature x bias x capacity x overflow x combination x allowed experts: drawn at random, many a test.
"""

import random

import pytest
import torch
from routing_reference import CLASSES, DRAW, RULES, mixed, reference

from model.classifier import NeckConfig, check_parts
from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import RouterConfig


def draw_case(kind, draw):
    """Random options of a rule that fit each other: (config, number of experts, combine)."""
    while True:
        experts = draw.choice([2, 3, 4, 6])
        overflow = draw.choice([None, "drop", "residual", "next_best"])
        options = {
            "top_k": draw.randint(1, min(experts, 4)),
            "temperature": draw.choice([1e-6, 0.1, 0.3, 1.0, 4.0, 1e6]),
        }
        options |= {"bias_rate": draw.choice([0.0, 0.1])}
        if overflow is not None:
            options |= {"capacity_factor": draw.choice([0.3, 0.75, 1.0, 1e300]), "overflow": overflow}
            options |= {"capacity_order": draw.choice(["position", "priority"])}
        if kind == "hierarchical":
            options |= {"groups": draw.choice([1, 2, 3]), "top_groups": draw.choice([1, 2])}
        if kind == "top_p":
            options |= {"p": draw.choice([0.05, 0.4, 0.77, 0.95])}
        if kind == "sinkhorn":  # its reference multiplies, and leaves the range of numbers at extreme temperatures
            options |= {"sinkhorn_iterations": draw.choice([1, 4, 16]), "temperature": draw.choice([0.3, 1.0, 4.0])}
        if kind == "deepseek":  # in float32 its scores tie at extreme temperatures
            options |= {"scores": draw.choice(["sigmoid", "softmax"]), "temperature": draw.choice([0.3, 1.0, 4.0])}
        if options.get("capacity_order") == "priority":  # so do the gates
            options |= {"temperature": draw.choice([1.0, 4.0])}
        config = RouterConfig(kind=kind, norm="none", noise_std=0.0, jitter=0.0, **options)
        combine = draw.choice(["logits", "probabilities"])
        try:
            check_parts(NeckConfig(), config, ExpertsConfig(sizes=[[]] * experts, combine=combine))
        except ValueError:
            continue
        return config, experts, combine


def build(config, experts, combine, dispatch):
    """The mixture with a gate that passes its input on, and without noise."""
    width = experts + config.groups if config.kind == "hierarchical" else experts
    moe = MixtureOfExperts(
        width, CLASSES, config, ExpertsConfig(sizes=[[]] * experts, combine=combine, dispatch=dispatch)
    )
    with torch.no_grad():
        if config.kind == "hash":
            moe.router.projection_DE.copy_(torch.eye(experts))
        else:
            moe.router.gate.weight.copy_(torch.eye(width))
            moe.router.gate.bias.zero_()
        if config.bias_rate:
            moe.router.bias_E.copy_(torch.randn(experts))
    return moe, width


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", sorted(RULES))
def test_rules_with_options_together_equal_a_reference_in_float64(kind, seed, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, DRAW))
    draw = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    for number in range(40):
        config, experts, combine = draw_case(kind, draw)
        moe, width = build(config, experts, combine, ("sorted", "grouped", "dense")[number % 3])
        training, batch = draw.random() < 0.5, draw.randint(1, 9)
        near = kind in ("deepseek", "sinkhorn") or config.capacity_order == "priority"
        sizes = [0.1, 1.0] if near else [0.1, 1.0, 100.0]
        size = draw.choice(sizes)
        x_BD = torch.randn(batch, width) * size
        allowed = [True] * experts
        if not training and draw.random() < 0.6:
            allowed = [draw.random() < 0.6 for _ in range(experts)]
            allowed[draw.randrange(experts)] = True
        with torch.no_grad():
            moe.train(training)
            for expert in moe.experts:
                expert[0].weight.normal_().div_(size)
            logits_BC, routing = moe(x_BD, allowed_E=None if all(allowed) else torch.tensor(allowed))
            outputs_BEC = torch.stack([expert.double()(x_BD.double()) for expert in moe.experts], dim=1).tolist()
        bias = moe.router.bias_E.tolist() if config.bias_rate else [0.0] * experts
        z_BE = routing.logits_BE if kind == "hash" else x_BD  # which standardises by running statistics
        weights, residual, dropped = reference(config, z_BE.double().tolist(), bias, allowed, training)
        case = (config, experts, combine, training, allowed, batch)
        assert (0 if routing.dropped is None else int(routing.dropped)) == dropped, case
        found = [{} for _ in range(batch)]
        for b, e, w in zip(
            routing.sample_A.tolist(), routing.expert_A.tolist(), routing.weight_A.tolist(), strict=True
        ):
            found[b][e] = w
        for b in range(batch):
            # An expert that may not be chosen may fill up the k, at weight 0.
            mine = {e: w for e, w in found[b].items() if allowed[e]}
            theirs = {e: w for e, w in weights[b].items() if allowed[e]}
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), (b, case)
            assert all(w == 0 for e, w in found[b].items() if not allowed[e]), (b, case)
            got = logits_BC[b].double()
            residual_B = routing.drops and routing.drops.residual_B
            if residual_B is not None:
                assert residual_B[b].item() == pytest.approx(residual[b], rel=1e-4, abs=1e-6), (b, case)
                got = got - residual[b] * moe.skip(x_BD[b]).double()
            expected = mixed(theirs, outputs_BEC[b], combine)
            scale = 1 + max(abs(value) for value in expected)
            assert ((got.log_softmax(dim=0) - torch.tensor(expected)).abs() / scale).max() < 1e-4, (b, case)
