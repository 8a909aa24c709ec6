"""Every rule, with combined options, against a reference that computes sample by sample in float64.

Rule x temperature x bias x capacity x overflow x combination x allowed experts: drawn at random, many per test.
"""

import math
import random

import pytest
import torch
from conftest import mostly_slow
from routing_reference import CLASSES, DRAW, RULES, Plain, best, mixed, reference, softmax

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
        if kind == "deepseek":  # in float32 its scores are tied at extreme temperatures
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


@pytest.mark.parametrize("seed", mostly_slow(range(2), [0]))
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
            allowed = allowed_at_random(experts, draw)
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


def allowed_at_random(experts, draw):
    allowed = [draw.random() < 0.6 for _ in range(experts)]
    allowed[draw.randrange(experts)] = True
    return allowed


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_expert_choice_with_options_together_equals_a_reference_in_float64(combine):
    draw = random.Random(combine)
    torch.manual_seed(0)
    for _ in range(40):
        experts, batch, training = draw.choice([2, 3, 6]), draw.randint(1, 9), draw.random() < 0.5
        factor = draw.choice([None, 0.3, 1.0, 1e-300])
        options = {"top_k": draw.randint(1, experts), "capacity_factor": factor, "norm": "none"}
        temperature = draw.choice([1e-6, 0.3, 1.0, 4.0] if not training else [1.0, 4.0])  # or gates tie in float32
        config = RouterConfig(kind="expert_choice", temperature=temperature, **options)
        moe, width = build(config, experts, combine, draw.choice(["sorted", "dense"]))
        moe.router.threshold_E.copy_(torch.rand(experts) * 0.6)
        threshold, x_BD = moe.router.threshold_E.tolist(), torch.randn(batch, width)
        allowed = [True] * experts if training else allowed_at_random(experts, draw)
        with torch.no_grad():
            logits_BC, _ = moe.train(training)(x_BD, allowed_E=None if all(allowed) else torch.tensor(allowed))
            outputs_BEC = torch.stack([expert.double()(x_BD.double()) for expert in moe.experts], dim=1).tolist()
        gates = [Plain(z, config, [0.0] * experts, allowed).gate() for z in x_BD.double().tolist()]
        taken = [{} for _ in range(batch)]
        for e in range(experts):
            places = min(batch, max(1, math.ceil(round(batch * (factor or config.top_k) / experts, 9))))
            for b in best([gate[e] for gate in gates], places) if training else range(batch):
                if training or (allowed[e] and gates[b][e] >= threshold[e]):
                    taken[b][e] = gates[b][e]
        for b in range(batch):
            if not training and not taken[b]:
                (first,) = best(gates[b], 1)
                taken[b] = {first: gates[b][first]}
            expected = torch.tensor(mixed(taken[b], outputs_BEC[b], combine))
            got = logits_BC[b].double().log_softmax(dim=0)
            torch.testing.assert_close(got, expected.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_with_options_together_equals_a_reference_in_float64(temperature, slots):
    draw = random.Random(slots)
    torch.manual_seed(0)
    for number in range(10):
        experts, tokens, width = draw.choice([1, 2, 4]), draw.randint(1, 5), 3
        config = RouterConfig(kind="soft_moe", top_k=1, slots=slots, temperature=temperature)
        moe = MixtureOfExperts(width, CLASSES, config, ExpertsConfig(sizes=[[4]] * experts)).eval()
        allowed = allowed_at_random(experts, draw) if number % 2 else [True] * experts
        x_BTD = torch.randn(2, tokens, width)
        with torch.no_grad():
            moe.router.scale.fill_(2.0)
            got_BC = moe(x_BTD, allowed_E=None if all(allowed) else torch.tensor(allowed))[0]
            moe.double()
            for x_TD, got_C in zip(x_BTD.double(), got_BC, strict=True):
                # Puigcerver 2023, section 2.1: slots read mixtures of tokens, tokens mixtures of what slots give.
                unit_TD = x_TD / x_TD.norm(dim=1, keepdim=True)
                unit_DP = moe.router.slots_DP / moe.router.slots_DP.norm(dim=0, keepdim=True)
                logits = (2.0 * unit_TD @ unit_DP / temperature).tolist()
                mixing = [softmax([row[p] for row in logits]) for p in range(experts * slots)]
                outputs = [moe.experts[p // slots](x_TD.new_tensor(mixing[p]) @ x_TD) for p in range(experts * slots)]
                total_C = torch.zeros(CLASSES, dtype=torch.float64)
                for row in logits:
                    barred = [value if allowed[p // slots] else -math.inf for p, value in enumerate(row)]
                    total_C += sum(w * out_C for w, out_C in zip(softmax(barred), outputs, strict=True)) / tokens
                torch.testing.assert_close(got_C.double(), total_C, atol=1e-5, rtol=1e-4)
