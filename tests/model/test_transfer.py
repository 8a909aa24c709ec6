"""Starting from another model: copied weights, class rows by name, and frozen parts bit for bit."""

import pytest
import torch
from block_helpers import images, moe_vit, spread
from conftest import mostly_slow

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
    """A few steps with everything that changes weights and statistics."""
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


def test_parts_that_cannot_be_frozen_or_copied_are_reported():
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


GROWING = [
    *(("noisy_topk", {}), ("noisy_topk", {"bias_rate": 0.01}), ("noisy_topk", {"top_k": 1}), ("article", {})),
    *(("mixtral", {}), ("gshard", {}), ("vmoe", {}), ("top_p", {"p": 0.7}), ("sinkhorn", {}), ("expert_choice", {})),
    *(("deepseek", {}), ("deepseek", {"top_k": 1}), ("deepseek", {"scores": "softmax"}), ("switch", {"top_k": 1})),
    ("noisy_topk", {"hidden": [7], "temperature": 0.3}),
]


def grown_behind(grown, add=(), dispatch="auto", combine="logits", **router) -> VisionMoE:
    sizes = [[6], [], [8, 4], *add]
    if combine == "probabilities" and router["kind"] == "switch":
        combine = "logits"
    experts = ExpertsConfig(
        sizes=sizes, shared=[[5]], dropout=0.0, dispatch=dispatch, combine=combine, grown=list(grown), add=list(add)
    )
    return VisionMoE((12,), 5, NeckConfig(norm="batch"), RouterConfig(**({"top_k": 2} | router)), experts, 2)


@pytest.mark.parametrize(
    "kind, options, dispatch",
    [
        *((kind, options, "auto") for kind, options in GROWING[:4]),
        *(pytest.param(kind, options, "auto", marks=pytest.mark.slow) for kind, options in GROWING[4:]),
        *(("noisy_topk", {"bias_rate": 0.01}, dispatch) for dispatch in ("dense", "grouped")),
    ],
    ids=str,
)
def test_new_experts_change_no_bit_and_then_get_samples(kind, options, dispatch):
    torch.manual_seed(1)
    router = {"kind": kind, "warmup_steps": 4} | options
    before = grown_behind([], dispatch=dispatch, **router)
    train_on(before, 5)
    model = grown_behind([3], [[6], [3]], dispatch=dispatch, **router)
    take(model, state(before), Shared.by_name(BEFORE, BEFORE))
    x = torch.randn(64, 12)
    (logits, (old,)), (now, (new,)) = before.eval()(x), model.eval()(x)
    assert torch.equal(logits, now)
    assert new.counts_E[3:].sum() == 0 and torch.equal(new.counts_E[:3], old.counts_E)
    frozen = Frozen(model, ["router", "experts", "shared", "neck"], Shared.by_name(BEFORE, BEFORE), 5)
    kept = state(model)
    train_on(model, 12, frozen)
    assert model.moe.usage_E[3:].sum() > 0 and not model.moe.router.margin_E.any()
    for name, value in model.state_dict().items():
        if ".experts.3." in name or ".experts.4." in name:
            moved = not torch.equal(value, kept[name])
            assert moved or "bias" in name or "running" in name or not value.is_floating_point(), name
        elif name.startswith(("moe.router.gate.", "moe.router.noise.")):
            assert torch.equal(value[:3], kept[name][:3]), name


def train_on(model, steps, frozen=None) -> None:
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    step = TrainingStep(model, optimizer, BalanceConfig(switch=0.3), 0.0, 0.0, "float32", frozen)
    for _ in range(steps):
        model.train()
        if frozen:
            frozen.hold()
        x = torch.randn(32, 12) if isinstance(model, VisionMoE) else images(32)
        assert step(x, torch.randint(5, (32,)), warmup=False) is not None


@pytest.mark.parametrize("kind", ["mixtral", "vmoe", "noisy_topk"])
def test_also_with_probabilities_and_for_a_second_addition(kind):
    before = grown_behind([], kind=kind, combine="probabilities")
    train_on(before, 4)
    once = grown_behind([3], [[6]], kind=kind, combine="probabilities", warmup_steps=2)
    take(once, state(before), Shared.by_name(BEFORE, BEFORE))
    x = torch.randn(50, 12)
    assert torch.equal(before.eval()(x)[0], once.eval()(x)[0])
    train_on(once, 6)
    sizes = [[6], [], [8, 4], [6], [4]]
    experts = ExpertsConfig(sizes=sizes, shared=[[5]], dropout=0.0, combine="probabilities", grown=[3, 4], add=[[4]])
    twice = VisionMoE((12,), 5, NeckConfig(norm="batch"), RouterConfig(kind=kind), experts, 2)
    take(twice, state(once), Shared.by_name(BEFORE, BEFORE))
    assert torch.equal(once.eval()(x)[0], twice.eval()(x)[0])


@pytest.mark.parametrize("level", mostly_slow(["token", "image"], ["token"]))
@pytest.mark.parametrize("kind", mostly_slow(["mixtral", "vmoe", "deepseek"], ["deepseek"]))
@pytest.mark.parametrize("ffn", [False, True])
def test_new_experts_inside_the_vit_change_no_bit(kind, level, ffn):
    old = {"kind": "ffn", "sizes": [[64]] * 3} if ffn else {"sizes": [[2], [4], [6]], "head": [[4], [3], [5]]}
    add = [[64]] if ffn else [[3]]
    head = {} if ffn else {"head": [*old["head"], *add]}
    router = {"kind": kind, "level": level, "warmup_steps": 2}
    before = spread(moe_vit(experts=old, **router))
    model = moe_vit(experts=old | {"sizes": old["sizes"] + add, "grown": [3], "add": add} | head, **router)
    take(model, state(before), Shared.by_name(BEFORE, BEFORE))
    x = images(6)
    assert torch.equal(before.eval()(x)[0], model.eval()(x)[0])
    frozen = Frozen(model, ["router", "experts"], Shared.by_name(BEFORE, BEFORE), 5)
    kept = state(model)
    train_on(model, 12, frozen)
    assert all(mixture.usage_E[3] > 0 for mixture in model.mixtures)
    for name, value in model.state_dict().items():
        if name.endswith("experts.down.weight"):
            assert torch.equal(value[:12], kept[name][:12]) and not torch.equal(value[12:], kept[name][12:])
        if name.endswith("experts.up"):
            assert torch.equal(value[:, :12], kept[name][:, :12]) and not torch.equal(value[:, 12:], kept[name][:, 12:])
        if ".copies." in name:
            assert torch.equal(value, kept[name]) == (".copies.3." not in name), name


@pytest.mark.parametrize("kind", ["hash", "hierarchical"])
def test_rules_that_cannot_get_new_experts_are_reported(kind):
    with pytest.raises(ValueError, match="cannot get new experts"):
        grown_behind([3], [[6]], kind=kind, groups=2)


def test_frozen_weights_are_counted():
    model = grown_behind([3], [[6]], kind="mixtral")
    frozen = Frozen(model, ["router", "experts", "shared", "neck"], Shared.by_name(BEFORE, BEFORE), 5)
    rows = class_rows(model)
    whole = sum(
        value.numel()
        for name, value in model.named_parameters()
        if part_of(name, rows) != "head" and ".experts.3." not in name
    )
    assert frozen.count == whole - 13  # less the new gate column, of 12 weights and a bias
