"""The distance to the gate that a training starts from: by hand, under each rule, and storage of the old gate."""

import copy
import math

import pytest
import torch
from block_helpers import images, moe_vit, spread
from routing_helpers import listed_routing

from model.balance import BalanceConfig, balance_losses
from model.errors import InputError
from model.losses import LOSSES
from model.old_gate import OldGate, hold_old_gates, load_old_gates, old_gates
from model.routers import ROUTERS, RouterConfig, build_router
from training.step import TrainingStep

CONFIG = BalanceConfig(old_gate=1.0)
GATED = [name for name, rule in ROUTERS.items() if rule.learns and not rule.reads_tokens]


def routed(new: list[list[float]], old: list[list[float]] | None):
    none = torch.zeros(0, dtype=torch.int64)
    old_BE = None if old is None else torch.tensor(old).log()
    return listed_routing(none, none, torch.zeros(0), torch.tensor(new).log(), old_BE=old_BE)


def test_the_divergence_by_hand():
    # sample 1: 3/4 ln(3/4 : 1/2) + 1/4 ln(1/4 : 1/2); sample 2: the gates are equal
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    found = balance_losses(routed([[0.5, 0.5], [0.2, 0.8]], [[0.75, 0.25], [0.2, 0.8]]), CONFIG)["old_gate"]
    assert float(found) == pytest.approx(expected)
    # A third expert that the old gate does not have takes half of the weight: among the other two nothing changes.
    grown = routed([[0.375, 0.125, 0.5]], [[0.75, 0.25]])
    assert float(balance_losses(grown, CONFIG)["old_gate"]) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(InputError, match="hold_old_gates"):
        balance_losses(routed([[0.5, 0.5]], None), CONFIG)


@pytest.mark.parametrize("kind", GATED)
def test_the_old_gate_stays_fixed_and_attracts_the_new_one(kind):
    torch.manual_seed(0)
    config = RouterConfig(kind=kind, top_k=ROUTERS[kind].only_top_k or 2, norm="none", temperature=2.0)
    router = build_router(config, 4, 4).train()
    with torch.no_grad():
        router.gate.weight.normal_()
    before, listed = router.gate.weight.detach().clone(), router.state_dict().keys()
    router.old = OldGate(router, 4)
    x_BE = torch.randn(16, 4)
    assert router.old(x_BE).equal(router.clean_logits(x_BE).detach()) and router.state_dict().keys() == listed
    equal = LOSSES["old_gate"](router(x_BE)).detach()
    assert float(equal) == pytest.approx(0.0, abs=1e-3)  # only the new gate has jitter
    with torch.no_grad():
        router.gate.weight.add_(torch.randn_like(router.gate.weight))
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    distances = []
    for _ in range(40):
        loss = LOSSES["old_gate"](router(x_BE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < distances[0] / 2
    assert router.old.router.gate.weight.equal(before)
    assert router.eval()(x_BE).gate.old_BE is None


@pytest.mark.parametrize("top", [None, [[4], [4], [4]]])
def test_a_training_step_compares_every_gate_inside_the_vit(top):
    model = spread(moe_vit(experts={"head": top} if top else {}, kind="noisy_topk", norm="batch"))
    hold_old_gates(model)
    stored, state = old_gates(model), set(model.state_dict())
    held = {name: value.clone() for name, value in stored.items()}
    assert len([name for name in stored if name.endswith("gate.weight")]) == len(model.mixtures)
    assert not any(".old." in name for name in [*state, *(name for name, _ in model.named_parameters())])
    copied = copy.deepcopy(model)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.1), CONFIG, 0.0, 0.0, "float32")
    model.train()
    found = [step(images(8), torch.arange(8) % 3, warmup=False) for _ in range(2)]
    assert found[1].auxiliary["old_gate"].shape == (len(model.mixtures),) and (found[1].auxiliary["old_gate"] > 0).all()
    assert all(value.equal(held[name]) for name, value in old_gates(model).items())
    # A resuming process builds the model again and loads the old gate of the first one.
    fresh = spread(moe_vit(experts={"head": top} if top else {}, kind="noisy_topk", norm="batch"))
    hold_old_gates(fresh)
    load_old_gates(fresh, old_gates(copied))
    fresh.load_state_dict(model.state_dict())
    assert all(value.equal(held[name]) for name, value in old_gates(fresh).items())
    with pytest.raises(ValueError, match="old gates"):
        load_old_gates(fresh, {})
