"""The dense twin of a run: one dense part with the same cost per sample replaces the mixture."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from assembly.pipeline import Inputs, build_bank, build_model
from common.errors import UserError, warn
from config.config import Config, config_from_dict, flatten
from evaluation.cost import flops, trained_cost
from evaluation.run_cost import si
from model.backbone import Backbone
from model.experts import EXPERTS, ExpertsConfig
from model.losses import LOSSES
from model.moe_vit import AnyMoE, MoEViT
from model.options import WIDEST
from model.routers import ROUTERS
from training.length import shorten_warmup


def planned(config: Config, inputs: Inputs) -> Config:
    """The configuration as a new run trains it: random routing in at most half of its steps, and `dense_twin`."""
    return dense_twin(shorten_warmup(config, len(inputs.splits.train)), inputs)


def dense_twin(config: Config, inputs: Inputs) -> Config:
    """The configuration of the dense twin, if dense_twin asks for one; else the configuration unchanged.

    The twin is a single expert that processes every sample. Its FLOPs are those of the whole mixture under an even
    load: gate, shared experts and the chosen experts of a sample. It has the layers of the expert with the closest
    FLOPs, made wider or narrower, in the same place and with the same training. twin_of records the options that
    it replaces. Raises UserError if the mixture cannot be built.
    """
    if not config.dense_twin or config.twin_of is not None:
        return config
    shape = build_bank(config, inputs.splits, inputs.backbone, inputs.device).feature_shape
    return twin_of(config, shape, inputs.splits.train.num_classes, inputs.backbone)


def twin_of(config: Config, shape: tuple[int, ...], classes: int, backbone: Backbone | None = None) -> Config:
    """As `dense_twin`, for features of this shape. backbone: the ViT, if the experts are inside it."""
    mixture = build_model(config, shape, classes, backbone)
    goal = trained_cost(mixture, shape).flops
    if isinstance(mixture, MoEViT):
        twin, cost = _inside(config, mixture, goal, shape, classes)
    else:
        twin, cost = _behind(config, mixture, goal, shape, classes)
    if abs(cost - goal) > 0.02 * goal:
        warn(f"the dense twin has {si(cost)} FLOPs per image, the mixture {si(goal)}: no closer size is possible")
    return twin


def _behind(config: Config, mixture: AnyMoE, goal: int, shape: tuple[int, ...], classes: int) -> tuple[Config, int]:
    """The twin behind the ViT, and its FLOPs per sample."""
    experts, width = config.experts, mixture.neck.out_features
    layers, dropout = _template(experts, width, classes, goal)
    narrow = build_model(_dense(config, [1] * len(layers), dropout), shape, classes)
    visits = narrow.mixtures[0].router.experts_per_sample

    def part(hidden: list[int]) -> int:
        return round(2 * visits * EXPERTS[experts.kind].work([width, *hidden, classes]))

    fixed = trained_cost(narrow, shape).flops - part([1] * len(layers))
    units = _nearest(lambda units: fixed + part(_scaled(layers, units)), goal)
    hidden = _scaled(layers, units)
    return _dense(config, hidden, dropout), fixed + part(hidden)


def _inside(config: Config, mixture: MoEViT, goal: int, shape: tuple[int, ...], classes: int) -> tuple[Config, int]:
    """The twin inside the ViT's blocks, and its FLOPs per image; a mixture on top also becomes one dense part."""
    head, dropout = [], config.experts.dropout
    if isinstance(dropout, list):
        _, dropout = _template(config.experts, mixture.width, mixture.width, goal // mixture.num_tokens)
    if config.experts.head:
        head = [[_units_on_top(config, mixture, classes)]]

    def cost(units: int) -> int:
        model = build_model(_dense(config, [units], dropout, head), shape, classes, mixture.backbone)
        return trained_cost(model, shape).flops

    try:
        one, two = cost(1), cost(2)
    except UserError:  # a part of fixed size, such as a copy of the FFN
        twin = _dense(config, list(config.experts.hidden(0)), dropout, head)
        return twin, trained_cost(build_model(twin, shape, classes, mixture.backbone), shape).flops
    units = _nearest(lambda units: one + (units - 1) * (two - one), goal)
    return _dense(config, [units], dropout, head), one + (units - 1) * (two - one)


def _units_on_top(config: Config, model: MoEViT, classes: int) -> int:
    """Hidden units of one dense part with the cost of the mixture on top, including its gate."""
    import torch

    on_top: Any = model.mixtures[-1]
    read_BD = torch.zeros(1, model.neck.out_features)
    share = on_top.router.experts_per_sample / len(on_top.experts)
    goal = flops(on_top.router, read_BD) + share * sum(flops(expert, read_BD) for expert in on_top.experts)
    return _nearest(lambda units: 2 * units * (model.neck.out_features + classes), round(goal))


def _template(experts: ExpertsConfig, width: int, outputs: int, goal: int) -> tuple[list[int], float]:
    """Hidden layers and dropout of the routed or shared expert whose FLOPs are closest to the goal."""
    work = EXPERTS[experts.kind].work
    every = range(len(experts.sizes) + len(experts.shared))
    costs = [2 * work([width, *experts.hidden(expert), outputs]) for expert in every]
    nearest = min(every, key=lambda expert: abs(np.log(costs[expert] / max(1, goal))))
    return experts.hidden(nearest) or [1], experts.dropout_of(nearest)


def _scaled(layers: Sequence[int], units: int) -> list[int]:
    """The layers scaled so that the first one has this many units."""
    return [units, *(max(1, round(width * units / layers[0])) for width in layers[1:])]


def _nearest(cost: Callable[[int], int], goal: int) -> int:
    """The number of units, at least 1, whose cost is closest to the goal; the cost must grow with the units."""
    low, high = 1, 2
    while cost(high) < goal and high < WIDEST:
        low, high = high, min(WIDEST, 2 * high)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost(middle) < goal else (low, middle)
    return low if low == 1 or cost(low) - goal <= goal - cost(low - 1) else low - 1


def _dense(config: Config, hidden: list[int], dropout: float | None, head: list | None = None) -> Config:
    """The configuration with one expert for all samples, and the options that it replaces in twin_of."""
    values, bare = config.to_dict(), Config().to_dict()
    before = flatten(values)
    values["experts"] |= {"sizes": [hidden], "head": head or [], "dropout": dropout, "add": [], "grown": []}
    values["experts"] |= {"shared": [], "inputs": None, "combine": "logits", "dispatch": "auto"}
    values["balance"] |= dict.fromkeys(LOSSES, 0.0)
    values["parallel"]["experts"] = 1
    router = {"kind": "mixtral", "top_k": 1, "norm": "none", "warmup_steps": 0, "level": config.router.level}
    if ROUTERS[config.router.kind].reads_tokens:
        router = {"kind": config.router.kind, "top_k": 1, "slots": config.router.slots}
    values["router"] = bare["router"] | router
    replaced = {key: before[key] for key, value in flatten(values).items() if before[key] != value}
    replaced.pop("parallel.experts", None)
    values |= {"dense_twin": True, "twin_of": json.dumps(replaced)}
    return config_from_dict(values)
