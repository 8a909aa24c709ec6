"""Starting from another model: what is taken, class rows by name, and frozen parts bit for bit."""

import pytest
import torch
from block_helpers import images, moe_vit, spread

from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.parts import PARTS, class_rows, part_of
from model.routers import RouterConfig
from model.transfer import Frozen, Shared, take
from training.step import TrainingStep

BEFORE, NOW = ["a", "b", "c", "d", "e"], ["x", "d", "a", "y"]


def behind(classes: int, **router) -> VisionMoE:
    experts = ExpertsConfig(sizes=[[6], [], [8, 4]], shared=[[5]], dropout=0.0)
    config = RouterConfig(**({"kind": "deepseek", "top_k": 2, "bias_rate": 0.01} | router))
    return VisionMoE((12,), classes, NeckConfig(norm="batch"), config, experts, 2)


def inside(classes: int, **router) -> "torch.nn.Module":
    router = {"kind": "noisy_topk", "bias_rate": 0.01} | router
    return spread(moe_vit(classes=classes, neck={"norm": "batch"}, **router))


def inputs(model) -> torch.Tensor:
    return torch.randn(16, 12) if isinstance(model, VisionMoE) else images(16)


def train(model, frozen=None, steps: int = 3) -> None:
    """A few steps with everything that moves weights and statistics."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    step = TrainingStep(model, optimizer, BalanceConfig(switch=0.1), 0.0, 1.0, "float32", frozen)
    classes = len(NOW)
    for _ in range(steps):
        model.train()
        if frozen:
            frozen.hold()
        assert step(inputs(model), torch.randint(classes, (16,)), warmup=False) is not None


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_every_parameter_has_a_part():
    for model in (behind(5), inside(5), moe_vit(experts={"head": [[4], [4], [4]]})):
        rows = class_rows(model)
        assert {part_of(name, rows) for name, _ in model.named_parameters()} <= set(PARTS)
        assert all(dict(model.named_parameters())[name].shape[0] == 5 for name in rows)
    assert class_rows(behind(5)) == {
        f"moe.{expert}.{name}"
        for expert in ("experts.0.4", "experts.1.0", "experts.2.8", "shared.0.4")
        for name in ("weight", "bias")
    }


@pytest.mark.parametrize("build", [behind, inside])
def test_class_rows_go_by_name_and_not_by_order(build):
    before, model = build(len(BEFORE)), build(len(NOW))
    for value in before.parameters():
        value.data.normal_()
    old, fresh = state(before), state(model)
    take(model, old, Shared.by_name(NOW, BEFORE))
    rows = class_rows(model)
    for name, value in model.state_dict().items():
        if name in rows:
            assert torch.equal(value[1], old[name][3]) and torch.equal(value[2], old[name][0])  # d and a
            assert torch.equal(value[[0, 3]], fresh[name][[0, 3]])  # x and y are new
        elif "usage" not in name:
            assert torch.equal(value, old[name])


def test_the_same_classes_give_the_same_function():
    for build in (behind, inside):
        before, model = build(5), build(5)
        train(before)
        take(model, state(before), Shared.by_name(BEFORE, BEFORE))
        x = inputs(model)
        assert torch.equal(before.eval()(x)[0], model.eval()(x)[0])
        assert not any(mixture.usage_E.any() for mixture in model.mixtures)  # samples of a run, which has had none


@pytest.mark.parametrize("build", [behind, inside])
@pytest.mark.parametrize("parts", [["router"], ["experts", "neck"], ["head"], ["neck", "router", "experts", "shared"]])
def test_frozen_parts_stay_bit_for_bit_and_the_others_learn(build, parts):
    model, shared = build(len(NOW)), Shared.by_name(NOW, BEFORE)
    frozen = Frozen(model, parts, shared, len(NOW))
    before, rows = state(model), class_rows(model)
    train(model, frozen)
    moved = set()
    for name, value in model.state_dict().items():
        part = part_of(name, rows)
        if part not in parts:
            moved |= {part} if not torch.equal(value, before[name]) else set()
        elif part == "head":
            assert torch.equal(value[[1, 2]], before[name][[1, 2]])
            assert not torch.equal(value[[0, 3]], before[name][[0, 3]])
        else:
            assert torch.equal(value, before[name]), name
    assert {part for part in PARTS if part not in parts and (part != "shared" or build is behind)} <= moved


def test_a_frozen_norm_uses_its_running_statistics():
    model = behind(len(NOW))
    frozen = Frozen(model, ["router"], Shared.by_name(NOW, BEFORE), len(NOW))
    model.train()
    frozen.hold()
    assert model.neck.norm.training and not model.moe.router.trunk[0].training


def test_what_cannot_be_frozen_or_taken_is_told():
    model = behind(len(NOW))
    with pytest.raises(ValueError, match="there is none"):
        Frozen(model, ["head"], Shared.by_name(NOW, ["q"]), len(NOW))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        Frozen(behind(5), list(PARTS), Shared.by_name(BEFORE, BEFORE), 5)
    with pytest.raises(ValueError, match="which this model does not have"):
        take(behind(4, kind="mixtral", bias_rate=0.0), state(model), Shared.by_name(NOW, NOW))
    with pytest.raises(ValueError, match="shape"):
        take(
            VisionMoE(
                (14,),
                4,
                NeckConfig(norm="batch"),
                RouterConfig(kind="deepseek", bias_rate=0.01),
                ExpertsConfig(sizes=[[6], [], [8, 4]], shared=[[5]]),
                2,
            ),
            state(model),
            Shared.by_name(NOW, NOW),
        )
